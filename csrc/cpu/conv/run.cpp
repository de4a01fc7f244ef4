#include "run.h"

#include <algorithm>

namespace otk {
namespace {

// Tiles that share one pass over a block's nonzeros: the nonzeros stay in L1 for them, their
// partial sums in L2.
constexpr int kGroup = 4;
// Strided planes use L1 worse than one contiguous tile does (the prefetcher runs past the end of
// every channel): a copy pays if this many nonzeros read each of its vectors...
constexpr int64_t kStageReuse = 6;
// ... and it stays in L2.
constexpr int64_t kStageFloats = 96 * 1024;
static_assert(kGroup <= kMaxStaged);
constexpr int kTileFloats = 10 * 1024;  // of a chunk's sub-tile

// More units than threads let the others go on while one thread is disturbed, but each of them
// copies input or reads weights again.
constexpr int64_t kUnitsPerThread = 2;

// Most nonzeros a (row block, chunk) can have.
int64_t block_nnz(const SparseWeight& w) {
  return std::min(w.nnz, int64_t{w.row_block} * w.chunk * w.kernel * w.kernel);
}

TileArgs block_args(const Run& run, int b) {
  const int64_t row0 = int64_t{b} * run.w->row_block;
  TileArgs a{};
  a.bias = run.w->bias ? run.w->bias + row0 : nullptr;
  a.out = run.out + (row0 - run.first_row) * run.out_channel;
  a.out_stride = run.out_channel;
  a.residual =
      run.residual ? run.residual + (row0 - run.first_row) * run.residual_channel : nullptr;
  a.residual_stride = run.residual_channel;
  a.act = run.act;
  return a;
}

// Vectors of a 1x1's sub-tile: fewer for wide chunks, so that a chunk's tile stays near L1's size.
int subtile_vectors(const SparseWeight& w, const Isa& isa) {
  return std::clamp<int>(kTileFloats / (w.chunk * isa.lanes), 1, isa.max_vectors);
}

// Of a 1x1 whose channels are `channel` floats apart.
CodeMap pointwise_map(int64_t channel) {
  CodeMap map{};
  map.channel_bytes = static_cast<uint32_t>(channel * 4);
  return map;
}

// Sub-tiles copied together, 0 if they are read in place.
int staged_subtiles(const Run& run, const Isa& isa) {
  const SparseWeight& w = *run.w;
  if (run.gathered || w.nnz < kStageReuse * w.cin) return 0;
  const int64_t one = int64_t{w.cin} * isa.max_vectors * isa.lanes;
  return static_cast<int>(std::min<int64_t>(kGroup, kStageFloats / one));
}

int64_t partial_floats(const SparseWeight& w, const Isa& isa) {
  return w.n_chunks > 1 ? Arena::rounded(int64_t{w.row_block} * isa.max_vectors * isa.lanes) : 0;
}

int64_t pointwise_scratch(const Run& run, const Isa& isa) {
  const SparseWeight& w = *run.w;
  const int64_t one = int64_t{w.cin} * isa.max_vectors * isa.lanes;
  return Arena::rounded(block_nnz(w)) + Arena::rounded(one * staged_subtiles(run, isa)) +
         kGroup * partial_floats(w, isa);
}

void run_pointwise(const Run& run, int64_t v0, int64_t v1, int b0, int b1, const Isa& isa,
                   Arena& local) {
  const SparseWeight& w = *run.w;
  // Offsets depend on the image size: they are made for one block at a time and serve its
  // sub-tiles, which keeps the pack itself free of sizes.
  auto* offsets = reinterpret_cast<uint32_t*>(local.take(block_nnz(w)));
  const int staged = staged_subtiles(run, isa);
  const int group_size = staged ? staged : kGroup;
  float* stage =
      staged ? local.take(int64_t{staged} * w.cin * isa.max_vectors * isa.lanes) : nullptr;
  float* partial[kGroup] = {};
  if (w.n_chunks > 1)
    for (float*& p : partial) p = local.take(int64_t{w.row_block} * isa.max_vectors * isa.lanes);

  const int tile_vectors = subtile_vectors(w, isa);
  const int64_t n_sub = (v1 - v0 + tile_vectors - 1) / tile_vectors;
  // Floats between the channels a nonzero's offset steps over.
  const int64_t channel = staged ? (v1 - v0 + n_sub - 1) / n_sub * isa.lanes : run.x_channel;
  const CodeMap map = pointwise_map(channel);
  int64_t first[kGroup];  // position
  int vectors[kGroup];
  const float* x[kGroup];  // first channel
  for (int64_t s0 = 0; s0 < n_sub; s0 += group_size) {
    const int n = static_cast<int>(std::min<int64_t>(group_size, n_sub - s0));
    for (int i = 0; i < n; ++i) {
      // Even sub-tiles: 25 vectors are 13 + 12, not 14 + 11.
      const int64_t begin = v0 + (v1 - v0) * (s0 + i) / n_sub;
      const int64_t end = v0 + (v1 - v0) * (s0 + i + 1) / n_sub;
      first[i] = begin * isa.lanes;
      vectors[i] = static_cast<int>(end - begin);
      x[i] = staged ? stage + i * w.cin * channel : run.x + first[i];
    }
    if (staged)
      isa.gather(run.x + first[0], run.x_channel, w.cin, vectors, n, stage, channel,
                 w.cin * channel);
    for (int b = b0; b < b1; ++b) {
      const TileArgs block_a = block_args(run, b);
      if (s0 == 0) check_rows(w, b, isa);
      for (int c = 0; c < w.n_chunks; ++c) {
        const int32_t* block = block_of(w, b, c);
        if (block[2] == block[0]) continue;
        TileArgs a = block_a;
        a.entries = w.entries + block[0];
        a.n_entries = block[2] - block[0];
        a.values = w.values + block[1];
        decode_block(w, b, c, isa, map, offsets);
        a.offsets = offsets;
        for (int i = 0; i < n; ++i) {
          a.x = x[i] + int64_t{c} * w.chunk * channel;
          a.partial = partial[i];
          a.vectors = vectors[i];
          a.out = block_a.out + first[i];
          if (run.residual) a.residual = block_a.residual + first[i];
          const int64_t left = run.positions - first[i];
          if (run.exact && left < int64_t{a.vectors} * isa.lanes)
            a.exact = static_cast<int32_t>(left);
          isa.tile(a);
        }
      }
    }
  }
}

// Tiles of a window that go through the chunks together.
int window_group(const Run& run) {
  const Window& g = *run.window;
  const SparseWeight& w = *run.w;
  const int64_t tile =
      w.chunk * g.channel_floats() + (w.n_chunks > 1 ? int64_t{w.cout} * g.pitch * g.lanes : 0);
  return static_cast<int>(std::clamp<int64_t>(kStageFloats / tile, 1, kGroup));
}

int64_t window_scratch(const Run& run) {
  const Window& g = *run.window;
  const SparseWeight& w = *run.w;
  const int64_t rows = int64_t{w.n_row_blocks} * w.row_block;
  const int64_t sums = w.n_chunks > 1 ? Arena::rounded(rows * g.pitch * g.lanes) : 0;
  return Arena::rounded(std::max<int64_t>(w.nnz, 1)) +
         Arena::rounded(int64_t{w.chunk} * w.kernel * w.kernel) +
         window_group(run) * (Arena::rounded(w.chunk * g.channel_floats()) + sums);
}

void run_window(const Run& run, int64_t t0, int64_t t1, int b0, int b1, const Isa& isa,
                Arena& local) {
  const SparseWeight& w = *run.w;
  const Window& g = *run.window;
  const int group_size = window_group(run);
  const int taps = w.kernel * w.kernel;
  const int32_t first_nnz = block_of(w, b0, 0)[1], end_nnz = block_of(w, b1, 0)[1];
  auto* offsets = reinterpret_cast<uint32_t*>(local.take(end_nnz - first_nnz));
  auto* table = reinterpret_cast<uint32_t*>(local.take(int64_t{w.chunk} * taps));
  const CodeMap map = g.code_map(w.chunk, table);
  for (int b = b0; b < b1; ++b) {
    check_rows(w, b, isa);
    for (int c = 0; c < w.n_chunks; ++c)
      decode_block(w, b, c, isa, map, offsets + (block_of(w, b, c)[1] - first_nnz));
  }
  const int64_t chunk_floats = w.chunk * g.channel_floats();
  const int64_t row_floats = int64_t{g.pitch} * g.lanes;
  float *stage[kGroup] = {}, *partial[kGroup] = {};
  for (int i = 0; i < group_size; ++i) {
    stage[i] = local.take(chunk_floats);
    if (w.n_chunks > 1) partial[i] = local.take(int64_t{b1 - b0} * w.row_block * row_floats);
  }
  Window::Tile tiles[kGroup];
  for (int64_t s = t0; s < t1; s += group_size) {
    const int n = static_cast<int>(std::min<int64_t>(group_size, t1 - s));
    for (int i = 0; i < n; ++i) tiles[i] = g.tile(s + i);
    // Chunks outermost: a tile's copy of one chunk is read from L1 by all rows.
    for (int c = 0; c < w.n_chunks; ++c) {
      const int channels = std::min(w.chunk, w.cin - c * w.chunk);
      g.stage(isa, tiles, n, run.x + int64_t{c} * w.chunk * run.x_channel, run.x_channel, channels,
              stage);
      for (int b = b0; b < b1; ++b) {
        const int32_t* block = block_of(w, b, c);
        if (block[2] == block[0]) continue;
        const TileArgs block_a = block_args(run, b);
        TileArgs a = block_a;
        a.entries = w.entries + block[0];
        a.n_entries = block[2] - block[0];
        a.values = w.values + block[1];
        a.offsets = offsets + (block[1] - first_nnz);
        a.out_row = g.out_row;
        a.piece = g.piece;
        for (int i = 0; i < n; ++i) {
          const Window::Tile& t = tiles[i];
          const int64_t at = (t.row - g.row0) * g.out_row + t.col;
          a.x = stage[i];
          if (w.n_chunks > 1) a.partial = partial[i] + int64_t{b - b0} * w.row_block * row_floats;
          a.vectors = t.vectors;
          a.rows = t.rows;
          a.cols = t.cols;
          a.out = block_a.out + at;
          if (run.residual) a.residual = block_a.residual + at;
          isa.tile(a);
        }
      }
    }
  }
}

}  // namespace

EntrySums check_entries(const SparseWeight& w, int b, int c, const Isa& isa) {
  const int32_t* block = block_of(w, b, c);
  const EntrySums sums = isa.sum_entries(w.entries + block[0], block[2] - block[0]);
  const auto rows = static_cast<uint32_t>(std::min(w.row_block, w.cout - b * w.row_block));
  const auto nonzeros = static_cast<uint32_t>(block[3] - block[1]);
  if (sums.nonzeros != nonzeros || sums.largest_row >= rows) throw PackError{};
  return sums;
}

void check_rows(const SparseWeight& w, int b, const Isa& isa) {
  uint32_t begun = 0, finished = 0;
  for (int c = 0; c < w.n_chunks; ++c) {
    const EntrySums sums = check_entries(w, b, c, isa);
    begun += sums.begun;
    finished += sums.finished;
  }
  const auto rows = static_cast<uint32_t>(std::min(w.row_block, w.cout - b * w.row_block));
  const int32_t* block = block_of(w, b, 0);
  const bool alone = w.n_chunks > 1 || block[2] - block[0] == static_cast<int32_t>(rows);
  if (begun != rows || finished != rows || !alone) throw PackError{};
}

void decode_block(const SparseWeight& w, int b, int c, const Isa& isa, const CodeMap& map,
                  uint32_t* offsets) {
  const int32_t* block = block_of(w, b, c);
  const int channels = std::min(w.chunk, w.cin - c * w.chunk);
  const auto limit = static_cast<uint32_t>(channels * w.kernel * w.kernel);
  if (!isa.decode(w.codes + block[1], block[3] - block[1], limit, map, offsets)) throw PackError{};
}

int64_t chunk_floats(const SparseWeight& w) { return Arena::rounded(block_nnz(w)); }

void run_chunk(const Run& run, int c, int vectors, const float* x, const Isa& isa, float* partial,
               Arena& local) {
  const SparseWeight& w = *run.w;
  const int64_t mark = local.used();
  auto* offsets = reinterpret_cast<uint32_t*>(local.take(block_nnz(w)));
  const CodeMap map = pointwise_map(run.x_channel);
  for (int b = 0; b < w.n_row_blocks; ++b) {
    const int32_t* block = block_of(w, b, c);
    if (block[2] == block[0]) continue;
    decode_block(w, b, c, isa, map, offsets);
    TileArgs a = block_args(run, b);
    a.entries = w.entries + block[0];
    a.n_entries = block[2] - block[0];
    a.values = w.values + block[1];
    a.offsets = offsets;
    a.x = x;
    a.partial = partial + int64_t{b} * w.row_block * vectors * isa.lanes;
    a.vectors = vectors;
    isa.tile(a);
  }
  local.rewind(mark);
}

int64_t units_of(const Run& run, const Isa& isa) {
  return run.window ? run.window->tiles() : (run.positions + isa.lanes - 1) / isa.lanes;
}

int64_t run_scratch(const Run& run, const Isa& isa) {
  return run.window ? window_scratch(run) : pointwise_scratch(run, isa);
}

void run_range(const Run& run, int64_t u0, int64_t u1, int b0, int b1, const Isa& isa,
               Arena& local) {
  if (u0 >= u1 || b0 >= b1) return;
  (run.window ? run_window : run_pointwise)(run, u0, u1, b0, b1, isa, local);
}

void run_parallel(const Run& run, const Isa& isa, const Parallel& par) {
  const SparseWeight& w = *run.w;
  const int64_t units = units_of(run, isa);
  const int64_t want = par.threads <= 1 ? 1 : kUnitsPerThread * par.threads;
  const int64_t largest = run.window ? units : (units + isa.max_vectors - 1) / isa.max_vectors;
  int64_t cuts, blocks;
  if (run.window && largest >= want) {
    // Tiles first: row blocks would stage the same tile again.
    cuts = want;
    blocks = 1;
  } else {
    // Row blocks first: they share no weights. Not more than are wanted: each copies its input.
    blocks = std::clamp<int64_t>(w.n_row_blocks, 1, want);
    cuts = std::clamp<int64_t>((want + blocks - 1) / blocks, 1, largest);
    // Narrower tiles read a block's nonzeros once more each, which beats a thread without work.
    if (!run.window && cuts * blocks < par.threads)
      cuts = std::min(units, (par.threads + blocks - 1) / blocks);
  }
  // Row blocks differ in nonzeros, and cuts in vectors.
  deal(par, cuts * blocks, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cut = i % cuts, b = i / cuts;
      local.reset(run_scratch(run, isa));
      run_range(run, units * cut / cuts, units * (cut + 1) / cuts,
                static_cast<int>(w.n_row_blocks * b / blocks),
                static_cast<int>(w.n_row_blocks * (b + 1) / blocks), isa, local);
    }
  });
}

}  // namespace otk

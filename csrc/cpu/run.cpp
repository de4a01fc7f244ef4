#include "run.h"

#include <algorithm>

namespace otk {
namespace {

// Sub-tiles that share one pass over a block's nonzeros: the nonzeros stay in L1 for them, their
// partial sums in L2.
constexpr int kGroup = 4;
// Strided planes use L1 worse than one contiguous tile does (the prefetcher runs past the end of
// every channel): a copy pays if this many nonzeros read each of its vectors...
constexpr int64_t kStageReuse = 48;
// ... and it stays in L2.
constexpr int64_t kStageFloats = 96 * 1024;
constexpr int kTileFloats = 10 * 1024;
constexpr int kMaxSegments = 132;  // 16 lanes x 8 vectors of one-pixel rows, and a margin

struct SubTile {
  int64_t first;  // position
  int vectors;
  float* tile;  // copy of all channels, if staged
  Segment segments[kMaxSegments];
  int n_segments;
};

void cut_rows(const Run& run, const Isa& isa, SubTile& s) {
  s.n_segments = 0;
  const int64_t end = std::min(s.first + int64_t{s.vectors} * isa.lanes, run.positions);
  int64_t p = std::max<int64_t>(s.first, run.skip);
  while (p < end) {
    const int64_t row = (p - run.skip) / run.src_row;
    const int64_t col = (p - run.skip) - row * run.src_row;
    const int64_t row_end = p - col + run.src_row;
    if (col < run.valid) {
      const int64_t len = std::min(end, row_end - run.src_row + run.valid) - p;
      s.segments[s.n_segments++] = {static_cast<int32_t>(p - s.first), static_cast<int32_t>(len),
                                    row * run.dst_row + col};
    }
    p = row_end;
  }
}

// Most nonzeros a (row block, chunk) can have.
int64_t block_nnz(const SparseWeight& w) {
  return int64_t{w.row_block} * w.chunk * w.kernel * w.kernel;
}

}  // namespace

int64_t vectors_of(const Run& run, const Isa& isa) {
  return (run.positions + isa.lanes - 1) / isa.lanes;
}

// Vectors of a sub-tile: narrower ones for wide chunks, so that a chunk's tile stays near L1's
// size.
int subtile_vectors(const SparseWeight& w, const Isa& isa) {
  if (w.kernel != 1) return isa.max_vectors;
  return std::clamp<int>(kTileFloats / (w.chunk * isa.lanes), 1, isa.max_vectors);
}

// Sub-tiles copied together, 0 if they are read in place.
int staged_subtiles(const SparseWeight& w, const Isa& isa) {
  if (w.kernel != 1 || w.nnz < kStageReuse * w.cin) return 0;
  const int64_t one = int64_t{w.cin} * isa.max_vectors * isa.lanes;
  return static_cast<int>(std::min<int64_t>(kGroup, kStageFloats / one));
}

int64_t run_scratch(const SparseWeight& w, const Isa& isa) {
  const int64_t one = int64_t{w.cin} * isa.max_vectors * isa.lanes;
  const int64_t offsets =
      Arena::rounded(block_nnz(w)) + Arena::rounded(one * staged_subtiles(w, isa));
  if (w.n_chunks == 1) return offsets;
  return offsets + kGroup * Arena::rounded(int64_t{w.row_block} * isa.max_vectors * isa.lanes);
}

void run_range(const Run& run, int64_t v0, int64_t v1, int b0, int b1, const Isa& isa,
               Arena& local) {
  const SparseWeight& w = *run.w;
  if (v0 >= v1 || b0 >= b1) return;
  // Offsets depend on the image size: they are made for one block at a time and serve its
  // sub-tiles, which keeps the pack itself free of sizes.
  auto* offsets = reinterpret_cast<uint32_t*>(local.take(block_nnz(w)));
  // A 1x1 on a padded grid is read in place: its offsets are those of the grid.
  const int staged = run.tap_bytes ? 0 : staged_subtiles(w, isa);
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
  SubTile group[kGroup];
  for (int64_t s0 = 0; s0 < n_sub; s0 += group_size) {
    const int n = static_cast<int>(std::min<int64_t>(group_size, n_sub - s0));
    for (int i = 0; i < n; ++i) {
      // Even sub-tiles: 25 vectors are 13 + 12, not 14 + 11.
      const int64_t begin = v0 + (v1 - v0) * (s0 + i) / n_sub;
      const int64_t end = v0 + (v1 - v0) * (s0 + i + 1) / n_sub;
      group[i].first = begin * isa.lanes;
      group[i].vectors = static_cast<int>(end - begin);
      if (run.dst_row) cut_rows(run, isa, group[i]);
      if (staged) {
        group[i].tile = stage + i * w.cin * channel;
        isa.gather(run.x + group[i].first, run.x_channel, w.cin,
                   int64_t{group[i].vectors} * isa.lanes, group[i].tile, channel);
      }
    }
    for (int b = b0; b < b1; ++b) {
      TileArgs a{};
      const int64_t row0 = int64_t{b} * w.row_block;
      a.bias = w.bias ? w.bias + row0 : nullptr;
      a.out_stride = run.out_channel;
      a.residual_stride = run.residual_channel;
      a.relu = run.relu;
      for (int c = 0; c < w.n_chunks; ++c) {
        const int32_t* block = w.blocks + 2 * (int64_t{b} * w.n_chunks + c);
        if (block[2] == block[0]) continue;
        a.entries = w.entries + block[0];
        a.n_entries = block[2] - block[0];
        a.values = w.values + block[1];
        isa.decode(w.codes + block[1], block[3] - block[1], run.tap_bytes,
                   static_cast<uint32_t>(channel * 4), offsets);
        a.offsets = offsets;
        const float* x = run.x + int64_t{c} * w.chunk * run.x_channel;
        for (int i = 0; i < n; ++i) {
          const SubTile& s = group[i];
          a.x = staged ? s.tile + int64_t{c} * w.chunk * channel : x + s.first;
          a.partial = partial[i];
          a.vectors = s.vectors;
          a.out = run.out + row0 * run.out_channel;
          a.residual = run.residual ? run.residual + row0 * run.residual_channel : nullptr;
          if (run.dst_row) {
            a.segments = s.segments;
            a.n_segments = s.n_segments;
          } else {
            a.out += s.first;
            if (a.residual) a.residual += s.first;
          }
          isa.tile(a);
        }
      }
    }
  }
}

void run_parallel(const Run& run, const Isa& isa, const Parallel& par) {
  const SparseWeight& w = *run.w;
  const int64_t vectors = vectors_of(run, isa);
  const int64_t want = par.threads <= 1 ? 1 : int64_t{4} * par.threads;
  // Row blocks first: they share nothing. Then whole sub-tiles.
  const int64_t subs = (vectors + isa.max_vectors - 1) / isa.max_vectors;
  const int64_t cuts =
      std::clamp<int64_t>((want + w.n_row_blocks - 1) / std::max(w.n_row_blocks, 1), 1, subs);
  const int64_t blocks = par.threads <= 1 ? 1 : w.n_row_blocks;
  parallel_for(par, cuts * blocks, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cut = i % cuts, b = i / cuts;
      local.reset(run_scratch(w, isa));
      run_range(run, vectors * cut / cuts, vectors * (cut + 1) / cuts,
                static_cast<int>(w.n_row_blocks * b / blocks),
                static_cast<int>(w.n_row_blocks * (b + 1) / blocks), isa, local);
    }
  });
}

}  // namespace otk

// Linear layers of tokens: a group of tokens is turned into planes, goes through one or two packed
// 1x1 convolutions while it is in cache, and is turned back.
#include <algorithm>

#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"
#include "run.h"

namespace otk {
namespace {

// Input of a group of tokens that stays in L2 beside partial sums and weights.
constexpr int64_t kGroupFloats = 96 * 1024;
// All planes of a group that goes through two layers.
constexpr int64_t kPairFloats = 128 * 1024;
constexpr int64_t kFewestPairVectors = 8;
// Vectors of the narrowest group: the weights are read once for each.
constexpr int64_t kFewestVectors = 6;
constexpr int64_t kUnitsPerThread = 2;

struct Chain {
  const SparseWeight* first;  // null: one layer
  const SparseWeight* last;
  Tokens x, out;
  const Tokens* residual;
  Activation act;  // between the layers, or behind the only one
};

// Tokens [t0, t0 + tokens).
struct Group {
  int64_t t0, tokens;
  int64_t plane;  // floats between channels, of which whole vectors are used
  int64_t vectors;

  Group(int64_t begin, int64_t end, const Isa& isa)
      : t0(begin),
        tokens(end - begin),
        plane(plane_stride(tokens)),
        vectors((tokens + isa.lanes - 1) / isa.lanes) {}
};

Run run_of(const SparseWeight& w, const float* x, const Group& g, int first_row, float* out) {
  Run run{};
  run.w = &w;
  run.x = x;
  run.x_channel = run.out_channel = g.plane;
  run.positions = g.tokens;
  run.gathered = true;
  run.first_row = first_row;
  run.out = out;
  return run;
}

// The group's input as planes.
void to_planes(const Tokens& from, const Group& g, const Isa& isa, float* x) {
  const float* token = from.data + g.t0 * from.stride;
  if (from.channel == 1) return isa.to_planes(token, from.stride, g.tokens, from.width, x, g.plane);
  for (int64_t c = 0; c < from.width; ++c, token += from.channel, x += g.plane) {
    std::copy(token, token + g.tokens, x);
    std::fill(x + g.tokens, x + g.vectors * isa.lanes, 0.f);
  }
}

// Channels [row, row + rows) of the group's output, from its planes.
void to_tokens(const Chain& chain, const Group& g, const float* planes, int64_t row, int64_t rows,
               const Isa& isa) {
  const Tokens *out = &chain.out, *residual = chain.residual;
  isa.to_tokens(planes, g.plane, g.tokens, rows, out->data + g.t0 * out->stride + row, out->stride,
                residual ? residual->data + g.t0 * residual->stride + row : nullptr,
                residual ? residual->stride : 0);
}

// Row blocks [b0, b1) of a single layer.
void run_layer(const Chain& chain, const Group& g, int b0, int b1, const Isa& isa, Arena& local) {
  const SparseWeight& w = *chain.last;
  local.reset((int64_t{w.cin} + w.row_block) * g.plane +
              run_scratch(run_of(w, nullptr, g, 0, nullptr), isa));
  float* x = local.take(w.cin * g.plane);
  to_planes(chain.x, g, isa, x);
  float* out = local.take(w.row_block * g.plane);
  for (int b = b0; b < b1; ++b) {
    const int row = b * w.row_block;
    const int rows = std::min(w.row_block, w.cout - row);
    const int64_t mark = local.used();
    run_range(run_of(w, x, g, row, out), 0, g.vectors, b, b + 1, isa, local);
    local.rewind(mark);
    to_tokens(chain, g, out, row, rows, isa);
    if (chain.act.kind != kNone)
      isa.activate(chain.out.data + g.t0 * chain.out.stride + row, g.tokens, chain.out.stride, rows,
                   chain.act);
  }
}

int64_t last_rows(const SparseWeight& w) { return int64_t{w.n_row_blocks} * w.row_block; }

// Floats of a group's planes per float of a plane, and the partial sums.
int64_t pair_channels(const Chain& chain) {
  const SparseWeight &first = *chain.first, &last = *chain.last;
  return int64_t{first.cin} + first.row_block + last.chunk + last.cout;
}

// Two layers. What lies between them is used up chunk by chunk as soon as it is there, while it is
// in cache; only the sums of the second are kept for all of its rows.
void run_pair(const Chain& chain, const Group& g, const Isa& isa, Arena& local) {
  const SparseWeight &first = *chain.first, &last = *chain.last;
  const int64_t floats = g.vectors * isa.lanes;
  const int vectors = static_cast<int>(g.vectors);
  local.reset(
      pair_channels(chain) * g.plane + Arena::rounded(last_rows(last) * floats) +
      std::max(run_scratch(run_of(first, nullptr, g, 0, nullptr), isa), chunk_floats(last)));
  for (int b = 0; b < last.n_row_blocks; ++b) check_rows(last, b, isa);
  float* x = local.take(first.cin * g.plane);
  to_planes(chain.x, g, isa, x);
  float* hidden = local.take((first.row_block + last.chunk) * g.plane);
  float* out = local.take(last.cout * g.plane);
  float* partial = local.take(last_rows(last) * floats);
  const Run second = run_of(last, nullptr, g, 0, out);
  int64_t held = 0;  // channels in `hidden`, always less than a chunk between two blocks
  int c = 0;
  for (int b = 0; b < first.n_row_blocks; ++b) {
    const int row = b * first.row_block;
    const int64_t rows = std::min(first.row_block, first.cout - row);
    float* next = hidden + held * g.plane;
    const int64_t mark = local.used();
    run_range(run_of(first, x, g, row, next), 0, g.vectors, b, b + 1, isa, local);
    local.rewind(mark);
    isa.activate(next, rows, g.plane, floats, chain.act);
    held += rows;
    int64_t used = 0;
    for (; c < last.n_chunks; ++c) {
      const int64_t channels = std::min(last.chunk, last.cin - c * last.chunk);
      if (used + channels > held) break;
      run_chunk(second, c, vectors, hidden + used * g.plane, isa, partial, local);
      used += channels;
    }
    held -= used;
    std::copy_n(hidden + used * g.plane, used ? held * g.plane : 0, hidden);
  }
  to_tokens(chain, g, out, 0, last.cout, isa);
}

void run_chain(const Chain& chain, const Parallel& par) {
  const Isa& isa = active_isa();
  const SparseWeight& last = *chain.last;
  if (chain.x.count == 0 || last.cout == 0) return;
  const int64_t vectors = (chain.x.count + isa.lanes - 1) / isa.lanes;
  const int64_t most_in_tile = isa.max_vectors;
  const int64_t largest =
      chain.first
          ? std::clamp(kPairFloats / (pair_channels(chain) * isa.lanes),
                       std::min(kFewestPairVectors, most_in_tile), most_in_tile)
          : std::clamp(kGroupFloats / (chain.x.width * isa.lanes), most_in_tile, 4 * most_in_tile);
  const int64_t want = par.threads <= 1 ? 1 : kUnitsPerThread * par.threads;
  const int64_t most = std::max<int64_t>(vectors / kFewestVectors, 1);
  const int64_t groups = std::max((vectors + largest - 1) / largest, std::min(want, most));
  // The rows of one layer can be shared out as well; a group of two layers needs all rows between.
  const int64_t parts =
      chain.first ? 1 : std::clamp<int64_t>((want + groups - 1) / groups, 1, last.n_row_blocks);
  parallel_for(par, groups * parts, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / parts, p = i % parts;
      const int64_t t1 = vectors * (at + 1) / groups * isa.lanes;
      const Group g(vectors * at / groups * isa.lanes, std::min(t1, chain.x.count), isa);
      if (chain.first)
        run_pair(chain, g, isa, local);
      else
        run_layer(chain, g, static_cast<int>(last.n_row_blocks * p / parts),
                  static_cast<int>(last.n_row_blocks * (p + 1) / parts), isa, local);
    }
  });
}

}  // namespace

void sparse_linear(const SparseWeight& w, const Tokens& x, const Tokens& out,
                   const Tokens* residual, const Activation& act, const Parallel& par) {
  run_chain({nullptr, &w, x, out, residual, act}, par);
}

void sparse_mlp(const SparseWeight& w1, const SparseWeight& w2, const Tokens& x, const Tokens& out,
                const Tokens* residual, const Activation& act, const Parallel& par) {
  run_chain({&w1, &w2, x, out, residual, act}, par);
}

}  // namespace otk

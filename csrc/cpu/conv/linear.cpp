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

// A group as planes. Floats of a plane; whole vectors of them are used.
int64_t plane_of(int64_t tokens) { return plane_stride(tokens); }

Run run_of(const SparseWeight& w, const float* x, int64_t tokens, int first_row, float* out) {
  Run run{};
  run.w = &w;
  run.x = x;
  run.x_channel = run.out_channel = plane_of(tokens);
  run.positions = tokens;
  run.gathered = true;
  run.first_row = first_row;
  run.out = out;
  return run;
}

int64_t scratch_of(const Chain& chain, int64_t tokens, const Isa& isa) {
  const int64_t plane = plane_of(tokens);
  int64_t run = run_scratch(run_of(*chain.last, nullptr, tokens, 0, nullptr), isa);
  int64_t planes = chain.last->cin;
  if (chain.first) {
    run = std::max(run, run_scratch(run_of(*chain.first, nullptr, tokens, 0, nullptr), isa));
    planes += chain.first->cin;
  }
  return (planes + chain.last->row_block) * plane + run;
}

// Tokens [t0, t1) and row blocks [b0, b1) of the last layer.
void run_group(const Chain& chain, int64_t t0, int64_t t1, int b0, int b1, const Isa& isa,
               Arena& local) {
  const int64_t tokens = t1 - t0, plane = plane_of(tokens);
  const int64_t vectors = (tokens + isa.lanes - 1) / isa.lanes;
  const SparseWeight& last = *chain.last;
  local.reset(scratch_of(chain, tokens, isa));
  const auto planes_of = [&](int64_t channels) { return local.take(channels * plane); };
  float* x = planes_of(chain.x.width);
  const float* from = chain.x.data + t0 * chain.x.stride;
  if (chain.x.channel == 1) {
    isa.to_planes(from, chain.x.stride, tokens, chain.x.width, x, plane);
  } else {
    for (int64_t c = 0; c < chain.x.width; ++c, from += chain.x.channel) {
      std::copy(from, from + tokens, x + c * plane);
      std::fill(x + c * plane + tokens, x + c * plane + vectors * isa.lanes, 0.f);
    }
  }
  if (chain.first) {
    const SparseWeight& first = *chain.first;
    float* hidden = planes_of(first.cout);
    const Run run = run_of(first, x, tokens, 0, hidden);
    for (int b = 0; b < first.n_row_blocks; ++b) {
      const int64_t mark = local.used();
      run_range(run, 0, vectors, b, b + 1, isa, local);
      local.rewind(mark);
      const int64_t row = int64_t{b} * first.row_block;
      const int64_t rows = std::min<int64_t>(first.row_block, first.cout - row);
      isa.activate(hidden + row * plane, rows, plane, vectors * isa.lanes, chain.act);
    }
    x = hidden;
  }
  float* out = planes_of(last.row_block);
  for (int b = b0; b < b1; ++b) {
    const int row = b * last.row_block;
    const int rows = std::min(last.row_block, last.cout - row);
    const int64_t mark = local.used();
    run_range(run_of(last, x, tokens, row, out), 0, vectors, b, b + 1, isa, local);
    local.rewind(mark);
    float* to = chain.out.data + t0 * chain.out.stride + row;
    const float* residual =
        chain.residual ? chain.residual->data + t0 * chain.residual->stride + row : nullptr;
    isa.to_tokens(out, plane, tokens, rows, to, chain.out.stride, residual,
                  chain.residual ? chain.residual->stride : 0);
    if (!chain.first && chain.act.kind != kNone)
      isa.activate(to, tokens, chain.out.stride, rows, chain.act);
  }
}

void run_chain(const Chain& chain, const Parallel& par) {
  const Isa& isa = active_isa();
  const SparseWeight& last = *chain.last;
  if (chain.x.count == 0 || last.cout == 0) return;
  const int64_t vectors = (chain.x.count + isa.lanes - 1) / isa.lanes;
  const int64_t fit = kGroupFloats / (chain.x.width * isa.lanes);
  const int64_t largest = std::clamp<int64_t>(fit, isa.max_vectors, 4 * int64_t{isa.max_vectors});
  const int64_t want = par.threads <= 1 ? 1 : kUnitsPerThread * par.threads;
  const int64_t most = std::max<int64_t>(vectors / kFewestVectors, 1);
  const int64_t groups = std::max((vectors + largest - 1) / largest, std::min(want, most));
  // The rows of one layer can be shared out as well; a group of two layers needs all rows between.
  const int64_t parts =
      chain.first ? 1 : std::clamp<int64_t>((want + groups - 1) / groups, 1, last.n_row_blocks);
  parallel_for(par, groups * parts, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / parts, p = i % parts;
      const int64_t t1 = vectors * (g + 1) / groups * isa.lanes;
      run_group(chain, vectors * g / groups * isa.lanes, std::min(t1, chain.x.count),
                static_cast<int>(last.n_row_blocks * p / parts),
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

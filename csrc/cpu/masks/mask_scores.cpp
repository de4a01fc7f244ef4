// Scores of classes from masks, a tile of pixels at a time: enlarged masks of all queries exist for
// a tile only, which stays in the L2 cache until it is multiplied with the classes.
//
// A step of resizing first resizes rows, which the next rows of the tile share, then blends two of
// them. Every pixel is computed in one order, however the work is split.
#include <algorithm>
#include <cmath>

#include "../../otk.h"
#include "../support/capability.h"
#include "../support/pages.h"
#include "../support/parallel.h"
#include "../support/scratch.h"
#include "scores.h"

namespace otk {

extern const ScoresIsa scores_avx2, scores_avx512, scores_neon, scores_generic;

namespace {

const ScoresIsa& scores_isa() {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return scores_avx512;
    case Capability::kAvx2:
      return scores_avx2;
#elif defined(__aarch64__)
    case Capability::kNeon:
      return scores_neon;
#endif
    default:
      return scores_generic;
  }
}

constexpr int64_t kTileFloats = 1 << 18;   // enlarged masks of a tile
constexpr int64_t kClassFloats = 3 << 15;  // classes that a tile meets before it starts over
constexpr int64_t kTileRows = 4;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where position `at` of `out` lies between two of `in`: at (at + 1/2) in / out - 1/2, in whole
// numbers. Rounded, a position on a pixel could fall beside it, where processors fuse the product
// and the difference and others do not; and what has no weight still spoils a number if it has
// none.
struct Place {
  int64_t index;
  double fraction;
};
Place place(int64_t at, int64_t in, int64_t out) {
  const int64_t unit = 2 * out, x = std::max<int64_t>(0, (2 * at + 1) * in - out);
  return {x / unit, static_cast<double>(x % unit) / static_cast<double>(unit)};
}

// One step of resizing: both axes.
struct Step {
  int64_t in_h, in_w, out_w;
  bool same_rows;
  const int32_t* index;  // of the upper row
  const float *weight0, *weight1;
  Columns columns;
};

int64_t column_floats(int64_t out, const ScoresIsa& isa) {
  return 4 * Arena::rounded(up(out, kPanelVectors * isa.lanes));
}
int64_t step_floats(int64_t out_h, int64_t out_w, const ScoresIsa& isa) {
  return 3 * Arena::rounded(out_h) + column_floats(out_w, isa);
}

Columns new_columns(int64_t in, int64_t out, const ScoresIsa& isa, Arena& arena) {
  const int64_t padded = up(out, kPanelVectors * isa.lanes);
  auto* first = reinterpret_cast<int32_t*>(arena.take(padded));
  auto* offset = reinterpret_cast<int32_t*>(arena.take(padded));
  float *weight0 = arena.take(padded), *weight1 = arena.take(padded);
  bool narrow = true;
  for (int64_t x = 0; x < padded; ++x) {
    const int64_t v = x / isa.lanes, real = std::min(x, out - 1);
    const Place at = place(real, in, out);
    if (x % isa.lanes == 0) first[v] = static_cast<int32_t>(at.index);
    offset[x] = static_cast<int32_t>(at.index - first[v]);
    narrow = narrow && offset[x] < isa.lanes;
    weight0[x] = x < out ? static_cast<float>(1.0 - at.fraction) : 0.f;
    weight1[x] = x < out ? static_cast<float>(at.fraction) : 0.f;
  }
  return {first, offset, weight0, weight1, narrow, in == out};
}

Step new_step(const int64_t* in, const int64_t* out, const ScoresIsa& isa, Arena& arena) {
  auto* index = reinterpret_cast<int32_t*>(arena.take(out[0]));
  float *weight0 = arena.take(out[0]), *weight1 = arena.take(out[0]);
  for (int64_t y = 0; y < out[0]; ++y) {
    const Place at = place(y, in[0], out[0]);
    index[y] = static_cast<int32_t>(at.index);
    weight0[y] = static_cast<float>(1.0 - at.fraction);
    weight1[y] = static_cast<float>(at.fraction);
  }
  return {in[0], in[1],   out[1],  in[0] == out[0],
          index, weight0, weight1, new_columns(in[1], out[1], isa, arena)};
}

// The steps of a call, and its classes as the product reads them.
struct Plan {
  Step steps[2];
  int count;
  int64_t rows, blocks, whole;             // of classes, see ProductArgs
  const float* classes;                    // [n][block][query][row]
  int64_t tile_panels, tile_rows, panels;  // panels: of a row of the output
};

void pack_classes(const MaskScores& a, const Plan& plan, float* to) {
  for (int64_t n = 0; n < a.n; ++n) {
    for (int64_t b = 0, k = 0; b < plan.blocks; ++b) {
      const int64_t rows = b < plan.whole ? plan.rows : plan.rows - 1;
      for (int64_t q = 0; q < a.q; ++q) {
        const float* from = a.classes + n * a.classes_n + q * a.classes_q + k * a.classes_k;
        for (int64_t r = 0; r < rows; ++r) *to++ = from[r * a.classes_k];
      }
      k += rows;
    }
  }
}

Plan new_plan(const MaskScores& a, const ScoresIsa& isa, Arena& arena) {
  arena.reset(step_floats(a.size[0], a.size[1], isa) + step_floats(a.out[0], a.out[1], isa) +
              Arena::rounded(a.n * a.q * a.k));
  Plan plan{};
  const int64_t source[2] = {a.h, a.w};
  if (a.first) plan.steps[plan.count++] = new_step(source, a.size, isa, arena);
  if (a.second) plan.steps[plan.count++] = new_step(a.crop, a.out, isa, arena);
  plan.blocks = (a.k + isa.rows - 1) / isa.rows;
  plan.rows = (a.k + plan.blocks - 1) / plan.blocks;
  plan.whole = a.k - plan.blocks * (plan.rows - 1);
  float* classes = arena.take(a.n * a.q * a.k);
  pack_classes(a, plan, classes);
  plan.classes = classes;
  const int64_t panel = kPanelVectors * isa.lanes;
  plan.panels = (a.out[1] + panel - 1) / panel;
  const int64_t fit = std::max<int64_t>(1, kTileFloats / (std::max<int64_t>(1, a.q) * panel));
  plan.tile_panels = std::min(plan.panels, std::max<int64_t>(1, fit / kTileRows));
  plan.tile_rows = std::min(a.out[0], std::max<int64_t>(1, fit / plan.tile_panels));
  return plan;
}

// What a tile reads of the input of a step, and computes of its output.
struct Window {
  int64_t begin, end;   // vectors of the resized rows
  int64_t first, last;  // columns of the input
};

// MaskRows of one query on their way through the steps.
class MaskRows {
 public:
  MaskRows(const MaskScores& a, const Plan& plan, const ScoresIsa& isa, Arena& arena)
      : a_(a), plan_(plan), isa_(isa), source_(take(a.w, arena)), middle_(take(a.size[1], arena)) {
    for (int s = 0; s < plan.count; ++s)
      for (float*& row : resized_[s]) row = take(plan.steps[s].out_w, arena);
  }
  static int64_t floats(const MaskScores& a, const ScoresIsa& isa) {
    return padded(a.w, isa) + 3 * padded(a.size[1], isa) + 4 * padded(a.out[1], isa);
  }

  // Columns [begin, end) of the output are to come.
  void set_columns(int64_t begin, int64_t end) {
    for (int s = plan_.count - 1; s >= 0; --s) {
      const Step& step = plan_.steps[s];
      Window& window = windows_[s];
      window.begin = begin / isa_.lanes;
      window.end = (end + isa_.lanes - 1) / isa_.lanes;
      window.first = column(step, window.begin * isa_.lanes);
      window.last = std::min(step.in_w - 1, column(step, std::min(end, step.out_w) - 1) + 1);
      begin = window.first;
      end = window.last + 1;
    }
    source_begin_ = begin;
    source_end_ = std::min(end, a_.w);
  }
  void set_query(const float* mask) {
    mask_ = mask;
    for (auto& step : cached_) step[0] = step[1] = -1;
  }
  // Row y of the output before its sigmoid, from the first column on.
  Between output(int64_t y) {
    if (plan_.count == 0) return {source(y), nullptr, 1.f, 0.f};
    return between(plan_.count - 1, y);
  }

 private:
  static int64_t padded(int64_t width, const ScoresIsa& isa) {
    return Arena::rounded(up(width, kPanelVectors * isa.lanes) + 2 * isa.lanes);
  }
  float* take(int64_t width, Arena& arena) const {
    float* row = arena.take(padded(width, isa_));
    std::fill(row, row + padded(width, isa_), 0.f);
    return row;
  }
  int64_t column(const Step& step, int64_t x) const {
    return step.columns.first[x / isa_.lanes] + step.columns.offset[x];
  }

  const float* source(int64_t y) {
    const float* from = mask_ + y * a_.masks_h + source_begin_ * a_.masks_w;
    const int64_t count = source_end_ - source_begin_;
    if (a_.masks_w == 1) {
      std::copy(from, from + count, source_);
    } else {
      for (int64_t x = 0; x < count; ++x) source_[x] = from[x * a_.masks_w];
    }
    source_[count] = source_[count - 1];  // the neighbour of the last column is itself
    return source_;
  }

  Between between(int s, int64_t y) {
    const Step& step = plan_.steps[s];
    const int64_t top = step.index[y];
    const int64_t bottom = step.same_rows ? top : std::min(top + 1, step.in_h - 1);
    const float* upper = resized(s, top);
    return {upper, resized(s, bottom), step.weight0[y], step.weight1[y]};
  }

  // Row y of the input of step s, its columns resized. Two neighbours are kept.
  const float* resized(int s, int64_t y) {
    float* to = resized_[s][y % 2];
    if (cached_[s][y % 2] == y) return to;
    cached_[s][y % 2] = y;
    const Window& window = windows_[s];
    const float* from;
    int64_t origin = window.first;
    if (s == 0) {
      from = source(y);
    } else {
      const Window& before = windows_[s - 1];
      isa_.blend(between(s - 1, y), before.end - before.begin, middle_);
      from = middle_;
      origin = before.begin * isa_.lanes;
      const int64_t last = window.last - origin;
      middle_[last + 1] = middle_[last];
    }
    isa_.resize({&plan_.steps[s].columns, from - origin, window.begin, window.end, to});
    return to;
  }

  const MaskScores& a_;
  const Plan& plan_;
  const ScoresIsa& isa_;
  float *source_, *middle_, *resized_[2][2] = {};
  Window windows_[2] = {};
  int64_t cached_[2][2] = {}, source_begin_ = 0, source_end_ = 0;
  const float* mask_ = nullptr;
};

struct Tile {
  int64_t n, row, rows, panel, panels;
};

void enlarge(const MaskScores& a, const ScoresIsa& isa, const Plan& plan, const Tile& tile,
             MaskRows& rows, float* to) {
  const int64_t panel = kPanelVectors * isa.lanes, stride = a.q * panel;
  rows.set_columns(tile.panel * panel, std::min((tile.panel + tile.panels) * panel, a.out[1]));
  for (int64_t q = 0; q < a.q; ++q) {
    const float* mask = a.masks + tile.n * a.masks_n + q * a.masks_q;
    rows.set_query(mask);
    for (int64_t y = 0; y < tile.rows; ++y) {
      isa.finish({rows.output(tile.row + y), tile.panels, to + y * tile.panels * stride + q * panel,
                  stride, plan.count > 0});
    }
  }
}

void multiply(const MaskScores& a, const ScoresIsa& isa, const Plan& plan, const Tile& tile,
              const float* enlarged, float* out) {
  const int64_t panel = kPanelVectors * isa.lanes, plane = a.out[0] * a.out[1];
  const int64_t block = plan.rows * a.q;
  const int64_t chunk = std::max<int64_t>(1, kClassFloats / std::max<int64_t>(1, block));
  const float* classes = plan.classes + tile.n * a.q * a.k;
  int64_t k = 0;
  for (int64_t b = 0; b < plan.blocks; b += chunk) {
    const int64_t blocks = std::min(chunk, plan.blocks - b);
    const int64_t whole = std::clamp<int64_t>(plan.whole - b, 0, blocks);
    for (int64_t i = 0; i < tile.rows * tile.panels; ++i) {
      const int64_t y = tile.row + i / tile.panels, x = (tile.panel + i % tile.panels) * panel;
      isa.product({classes + k * a.q, blocks, whole, plan.rows, a.q, enlarged + i * a.q * panel,
                   out + (tile.n * a.k + k) * plane + y * a.out[1] + x, plane,
                   std::min(panel, a.out[1] - x)});
    }
    k += blocks * (plan.rows - 1) + whole;
  }
}

}  // namespace

void mask_scores(const MaskScores& a, float* out, const Parallel& par) {
  if (a.n * a.k * a.out[0] * a.out[1] == 0) return;
  // The result is large and new: on small pages much of the time would be page faults.
  pages_advise(out, sizeof(float) * static_cast<size_t>(a.n * a.k * a.out[0] * a.out[1]));
  const ScoresIsa& isa = scores_isa();
  const Plan plan = new_plan(a, isa, thread_scratch().shared);
  const int64_t across = (plan.panels + plan.tile_panels - 1) / plan.tile_panels;
  const int64_t down = (a.out[0] + plan.tile_rows - 1) / plan.tile_rows;
  const int64_t floats = plan.tile_rows * plan.tile_panels * a.q * kPanelVectors * isa.lanes;
  parallel_for(par, a.n * down * across, [&](int64_t begin, int64_t end) {
    Arena& arena = thread_scratch().local;
    arena.reset(Arena::rounded(floats) + MaskRows::floats(a, isa));
    float* enlarged = arena.take(floats);
    MaskRows rows(a, plan, isa, arena);
    for (int64_t i = begin; i < end; ++i) {
      Tile tile{i / (down * across), i / across % down * plan.tile_rows, plan.tile_rows,
                i % across * plan.tile_panels, plan.tile_panels};
      tile.rows = std::min(tile.rows, a.out[0] - tile.row);
      tile.panels = std::min(tile.panels, plan.panels - tile.panel);
      enlarge(a, isa, plan, tile, rows, enlarged);
      multiply(a, isa, plan, tile, enlarged, out);
    }
  });
}

}  // namespace otk

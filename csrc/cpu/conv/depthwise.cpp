// Depthwise convolutions: every plane is read through a copy of a few rows that stays in L1, with
// its border and, where there is a stride, its columns sorted by phase.
#include <algorithm>

#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"

namespace otk {
namespace {

constexpr int64_t kBandFloats = 6 * 1024;

}  // namespace

void depthwise_conv2d(const Depthwise& conv, const Planes& x, const Planes& out,
                      const Parallel& par) {
  const Isa& isa = active_isa();
  if (x.n == 0 || x.c == 0 || out.h <= 0 || out.w <= 0) return;
  DepthwiseArgs any{};
  any.row_stride = x.row_stride;
  any.h = x.h;
  any.w = x.w;
  any.kernel = conv.kernel;
  any.stride = conv.stride;
  any.padding = conv.padding;
  any.phases = std::min(conv.kernel, conv.stride);
  any.out_h = out.h;
  any.out_w = out.w;
  any.act = conv.act;
  const int64_t whole = (int64_t{out.w} + isa.lanes - 1) / isa.lanes * isa.lanes;
  any.pitch = Arena::rounded(whole + (conv.kernel - 1) / conv.stride);
  const int64_t row = any.phases * any.pitch;
  const int64_t fit = (kBandFloats / row - conv.kernel) / conv.stride + 1;
  // Rows between two windows are copied for nothing, so such windows are taken one by one.
  any.band = conv.stride > conv.kernel ? 1 : std::clamp<int64_t>(fit, 4, std::max(4, out.h));
  const int64_t rows = (any.band - 1) * conv.stride + conv.kernel;
  const int64_t taps = int64_t{conv.kernel} * conv.kernel;
  parallel_for(par, int64_t{x.n} * x.c, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    local.reset(rows * row);
    float* scratch = local.take(rows * row);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / x.c, c = i % x.c;
      DepthwiseArgs a = any;
      a.x = x.data + n * x.batch_stride + c * x.plane_stride;
      a.weight = conv.weight + c * taps;
      a.bias = conv.bias ? conv.bias[c] : 0.f;
      a.out = out.data + n * out.batch_stride + c * out.plane_stride;
      a.scratch = scratch;
      isa.depthwise(a);
    }
  });
}

}  // namespace otk

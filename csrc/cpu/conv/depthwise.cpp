// Depthwise convolutions, plane by plane; see isa_depthwise.inc.
#include <algorithm>

#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"

namespace otk {
namespace {

// Copied at once: it is read many times, from L1.
constexpr int64_t kBandFloats = 6 * 1024;

bool centred(const Depthwise& conv) {
  return (conv.kernel == 3 || conv.kernel == 5 || conv.kernel == 7) &&
         conv.padding == conv.kernel / 2;
}

// Masks are bits: those of all ones are no number, and only combined with others.
void make_masks(int32_t* masks, int kernel, int64_t pitch, int width) {
  for (int kx = 0; kx < kernel; ++kx)
    for (int64_t j = 0; j < pitch; ++j) {
      const int64_t x = j % width + kx - kernel / 2;
      masks[kx * pitch + j] = x >= 0 && x < width ? -1 : 0;
    }
}

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
  any.out_h = out.h;
  any.out_w = out.w;
  any.act = conv.act;
  int64_t row, spare = 0;
  if (centred(conv)) {
    row = x.w;
    spare = 2 * conv.padding + 2 * isa.lanes;
    any.mask_pitch = int64_t{x.w} + isa.lanes;
    Arena& shared = thread_scratch().shared;
    shared.reset(conv.kernel * any.mask_pitch);
    float* masks = shared.take(conv.kernel * any.mask_pitch);
    make_masks(reinterpret_cast<int32_t*>(masks), conv.kernel, any.mask_pitch, x.w);
    any.masks = masks;
  } else {
    const int64_t whole = (int64_t{out.w} + isa.lanes - 1) / isa.lanes * isa.lanes;
    any.phases = std::min(conv.kernel, conv.stride);
    any.pitch = Arena::rounded(whole + (conv.kernel - 1) / conv.stride);
    row = any.phases * any.pitch;
  }
  const int64_t fit = (kBandFloats / row - conv.kernel) / conv.stride + 1;
  // Rows between two windows are copied for nothing, so such windows are taken one by one.
  any.band = conv.stride > conv.kernel ? 1 : std::clamp<int64_t>(fit, 4, std::max(4, out.h));
  const int64_t copied = Arena::rounded(((any.band - 1) * conv.stride + conv.kernel) * row + spare);
  const int64_t taps = int64_t{conv.kernel} * conv.kernel;
  parallel_for(par, int64_t{x.n} * x.c, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    local.reset(copied + Arena::rounded(row));
    DepthwiseArgs a = any;
    a.scratch = local.take(copied);
    a.row = local.take(row);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / x.c, c = i % x.c;
      a.x = x.data + n * x.batch_stride + c * x.plane_stride;
      a.weight = conv.weight + c * taps;
      a.bias = conv.bias ? conv.bias[c] : 0.f;
      a.out = out.data + n * out.batch_stride + c * out.plane_stride;
      isa.depthwise(a);
    }
  });
}

}  // namespace otk

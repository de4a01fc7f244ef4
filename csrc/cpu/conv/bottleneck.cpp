#include <algorithm>

#include "band.h"
#include "pool_plane.h"
#include "run.h"

namespace otk {
namespace {

Planes image_of(const Planes& planes, int64_t n) {
  Planes image = planes;
  image.data += n * planes.batch_stride;
  image.n = 1;
  return image;
}

// With fewer bands per thread than this a disturbed thread keeps the others waiting.
constexpr int64_t kBandsPerThread = 2;

}  // namespace

void sparse_bottleneck(const Bottleneck& block, const Planes& x, const Planes& out,
                       const Parallel& par) {
  const Isa& isa = active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0) return;
  const Band any{block, x, out, isa};
  const int rows = any.rows();
  const int64_t bands = (out.h + rows - 1) / rows;

  if (par.threads <= 1 || x.n * bands >= kBandsPerThread * par.threads) {
    parallel_for(par, x.n * bands, [&](int64_t begin, int64_t end) {
      Arena& shared = thread_scratch().shared;
      shared.reset(any.floats(rows) + any.carry_floats());
      Carry carry;
      carry.rows = shared.take(any.carry_floats());
      const int64_t mark = shared.used();
      for (int64_t u = begin; u < end; ++u) {
        const int64_t n = u / bands;
        const int o0 = static_cast<int>(u % bands) * rows, o1 = std::min(o0 + rows, out.h);
        shared.rewind(mark);
        Band{block, image_of(x, n), image_of(out, n), isa}.run(o0, o1, shared, &carry, nullptr);
      }
    });
    return;
  }
  // Too few bands, and lower ones would not fill conv2's tiles: one image at a time, each
  // convolution split over output rows and sub-tiles.
  for (int n = 0; n < x.n; ++n) {
    Arena& shared = thread_scratch().shared;
    shared.reset(any.floats(out.h));
    Band{block, image_of(x, n), image_of(out, n), isa}.run(0, out.h, shared, nullptr, &par);
  }
}

void avg_pool2d(const Planes& x, const Planes& out, int k, const Parallel& par) {
  const Isa& isa = active_isa();
  parallel_for(par, int64_t{x.n} * x.c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_plane(x.data + i / x.c * x.batch_stride + i % x.c * x.plane_stride, x.row_stride,
                 out.data + i / x.c * out.batch_stride + i % x.c * out.plane_stride, out.h, out.w,
                 k, isa);
  });
}

}  // namespace otk

// The gradient of non-overlapping average pooling: memory bound, one pass over the larger side.
#include <algorithm>
#include <cstring>

#include "../../otk.h"
#include "../support/capability.h"
#include "../support/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace otk {
namespace {

// out[k * j .. k * j + k) = grad[j] * share.
void spread_plain(const float* grad, float* out, int64_t n, int k, float share) {
  for (int64_t j = 0; j < n; ++j) std::fill(out + j * k, out + (j + 1) * k, grad[j] * share);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void spread_avx2(const float* grad, float* out, int64_t n, int k,
                                                 float share) {
  int64_t j = 0;
  if (k == 2) {
    const __m256 factor = _mm256_set1_ps(share);
    const __m256i low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const __m256i high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    for (; j + 8 <= n; j += 8) {
      const __m256 g = _mm256_mul_ps(_mm256_loadu_ps(grad + j), factor);
      _mm256_storeu_ps(out + 2 * j, _mm256_permutevar8x32_ps(g, low));
      _mm256_storeu_ps(out + 2 * j + 8, _mm256_permutevar8x32_ps(g, high));
    }
  }
  spread_plain(grad + j, out + j * k, n - j, k, share);
}
#endif

}  // namespace

void avg_pool2d_backward(const Rows& grad, const Rows& out, int width, int k, const Parallel& par) {
  auto* spread = spread_plain;
#if defined(__x86_64__)
  if (has_avx2()) spread = spread_avx2;
#endif
  const int64_t w = width / k, h = w ? grad.length / w : 0;
  const float share = 1.f / (static_cast<float>(k) * static_cast<float>(k));
  parallel_for(par, out.outer * out.inner, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t i = plane / out.inner, j = plane % out.inner;
      const float* from = grad.data + i * grad.outer_stride + j * grad.inner_stride;
      float* const to = out.data + i * out.outer_stride + j * out.inner_stride;
      for (int64_t r = 0; r < h; ++r) {
        float* const first = to + r * k * width;
        spread(from + r * w, first, w, k, share);
        std::fill(first + w * k, first + width, 0.f);
        for (int copy = 1; copy < k; ++copy)
          std::memcpy(first + copy * int64_t{width}, first, width * sizeof(float));
      }
      std::fill(to + h * k * width, to + out.length + out.padding, 0.f);
    }
  });
}

}  // namespace otk

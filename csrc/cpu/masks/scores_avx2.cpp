// 16 registers: 12 sums, two vectors of pixels and a weight.
#if defined(__x86_64__)
#include <immintrin.h>

#include "scores.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define OTK_NAME avx2
#define OTK_LANES 8
#define OTK_ROWS 6
#define OTK_PERMUTE(v, i) ((Vec)_mm256_permutevar8x32_ps((__m256)(v), (__m256i)(i)))

namespace otk {
#include "scores_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

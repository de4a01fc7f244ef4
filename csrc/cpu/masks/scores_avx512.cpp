// 32 registers: 24 sums and two vectors of pixels.
#if defined(__x86_64__)
#include <immintrin.h>

#include "scores.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif
#define OTK_NAME avx512
#define OTK_LANES 16
#define OTK_ROWS 12
// With a mask of ones: the form without leaves gcc 12 with a variable that it warns about.
#define OTK_PERMUTE(v, i) ((Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(i), (__m512)(v)))

namespace otk {
#include "scores_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// 32 registers: 16 accumulators, 4 vectors of the right tile and 4 broadcasts.
#if defined(__x86_64__)
#include "eigen.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif
#define OTK_NAME avx512
#define OTK_LANES 8
#define OTK_ROWS 4
#define OTK_VECTORS 4

namespace otk {
#include "eigen_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

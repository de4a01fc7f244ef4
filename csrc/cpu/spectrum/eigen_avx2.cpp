// 16 registers: 8 accumulators, as many as two units of four cycles need.
#if defined(__x86_64__)
#include "eigen.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define OTK_NAME avx2
#define OTK_LANES 4
#define OTK_ROWS 4
#define OTK_VECTORS 2

namespace otk {
#include "eigen_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

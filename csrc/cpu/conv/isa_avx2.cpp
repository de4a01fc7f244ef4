// 8 lanes, 16 registers: 14 accumulators, a weight and a temporary.
#if defined(__x86_64__)
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define OTK_NAME avx2
#define OTK_LANES 8
#define OTK_VECTORS 14

namespace otk {
#include "isa_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

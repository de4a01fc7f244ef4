// 16 lanes. 32 registers would hold more accumulators, but a sub-tile of 8 vectors already fills as
// much of L1 as 16 vectors of AVX2 do, and longer ones leave too few channels per chunk.
#if defined(__x86_64__)
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif
#define OTK_NAME avx512
#define OTK_LANES 16
#define OTK_VECTORS 8

namespace otk {
#include "isa_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

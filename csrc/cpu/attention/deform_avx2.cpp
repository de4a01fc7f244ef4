// 32 channels are four registers.
#if defined(__x86_64__)
#include "deform.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define OTK_NAME avx2
#define OTK_LANES 8

namespace otk {
#include "deform_body.inc"
}  // namespace otk
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

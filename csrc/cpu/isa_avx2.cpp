// 8 lanes, 16 registers: 14 accumulators, a weight and a temporary.
#if defined(__x86_64__)
#include "isa.h"

#pragma GCC target("avx2,fma")
#define OTK_NAME avx2
#define OTK_LANES 8
#define OTK_VECTORS 14

namespace otk {
#include "isa_body.inc"
}  // namespace otk
#endif

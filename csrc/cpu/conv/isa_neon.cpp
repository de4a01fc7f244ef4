// 4 lanes, 32 registers; NEON is part of every 64-bit Arm CPU.
#if defined(__aarch64__)
#include "isa.h"

#define OTK_NAME neon
#define OTK_LANES 4
#define OTK_VECTORS 14

namespace otk {
#include "isa_body.inc"
}  // namespace otk
#endif

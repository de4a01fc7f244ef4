// NEON is part of every 64-bit Arm CPU.
#if defined(__aarch64__)
#include "deform.h"

#define OTK_NAME neon
#define OTK_LANES 4

namespace otk {
#include "deform_body.inc"
}  // namespace otk
#endif

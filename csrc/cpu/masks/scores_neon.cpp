// NEON is part of every 64-bit Arm CPU. 32 registers: 24 sums and two vectors of pixels.
#if defined(__aarch64__)
#include "scores.h"

#define OTK_NAME neon
#define OTK_LANES 4
#define OTK_ROWS 12

namespace otk {
#include "scores_body.inc"
}  // namespace otk
#endif

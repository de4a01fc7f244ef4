// 32 registers; NEON is part of every 64-bit Arm CPU.
#if defined(__aarch64__)
#include "eigen.h"

#define OTK_NAME neon
#define OTK_LANES 2
#define OTK_ROWS 4
#define OTK_VECTORS 4

namespace otk {
#include "eigen_body.inc"
}  // namespace otk
#endif

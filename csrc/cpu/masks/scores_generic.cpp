// No instruction set beyond the compiler's baseline.
#include "scores.h"

#define OTK_NAME generic
#define OTK_LANES 4
#define OTK_ROWS 5

namespace otk {
#include "scores_body.inc"
}  // namespace otk

// No instruction set beyond the compiler's baseline.
#include "deform.h"

#define OTK_NAME generic
#define OTK_LANES 4

namespace otk {
#include "deform_body.inc"
}  // namespace otk

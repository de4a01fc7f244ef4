// No instruction set beyond the compiler's baseline: runs everywhere, and is the readable oracle.
#include "isa.h"

#define OTK_NAME generic
#define OTK_LANES 4
#define OTK_VECTORS 8

namespace otk {
#include "isa_body.inc"
}  // namespace otk

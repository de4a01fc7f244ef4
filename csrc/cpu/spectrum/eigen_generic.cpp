// The compiler's baseline.
#include "eigen.h"

#define OTK_NAME generic
#define OTK_LANES 2
#define OTK_ROWS 4
#define OTK_VECTORS 2

namespace otk {
#include "eigen_body.inc"
}  // namespace otk

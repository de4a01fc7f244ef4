// The table of the instruction set in use.
#include "isa.h"

#include "../support/capability.h"

namespace otk {

const Isa& active_isa() {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return isa_avx512;
    case Capability::kAvx2:
      return isa_avx2;
#elif defined(__aarch64__)
    case Capability::kNeon:
      return isa_neon;
#endif
    default:
      return isa_generic;
  }
}

}  // namespace otk

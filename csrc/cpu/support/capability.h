// The instruction set in use; each family of kernels has a table of its own for it.
#pragma once

namespace otk {

enum class Capability { kGeneric, kNeon, kAvx2, kAvx512 };

// kGeneric too if the one that OPENTRANS_CPU_CAPABILITY names cannot be had: cpu_capability() says
// so, and the bindings ask it before they call a kernel.
Capability capability();

inline bool has_avx2() {
  return capability() == Capability::kAvx2 || capability() == Capability::kAvx512;
}

}  // namespace otk

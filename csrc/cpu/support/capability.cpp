// Which instruction set runs: the best the CPU has, or the one OPENTRANS_CPU_CAPABILITY names.
#include "capability.h"

#include <cstdlib>
#include <cstring>

#include "../../otk.h"

namespace otk {
namespace {

struct Known {
  Capability capability;
  const char* name;
};

constexpr Known kKnown[] = {
#if defined(__x86_64__)
    {Capability::kAvx512, "avx512"},
    {Capability::kAvx2, "avx2"},
#elif defined(__aarch64__)
    {Capability::kNeon, "neon"},
#endif
    {Capability::kGeneric, "generic"},
};

struct Choice {
  Capability capability;
  const char* name;  // null: none
  const char* why;   // if none
};

bool supported(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (capability == Capability::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  (void)capability;
  return true;
}

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* forced = std::getenv("OPENTRANS_CPU_CAPABILITY");
  if (forced && (!*forced || !std::strcmp(forced, "auto"))) forced = nullptr;
  for (const Known& known : kKnown) {
    if (forced && std::strcmp(forced, known.name) != 0) continue;
    if (supported(known.capability)) return {known.capability, known.name, nullptr};
    if (forced) return {Capability::kGeneric, nullptr, "this CPU does not support it"};
  }
  return {Capability::kGeneric, nullptr, "it is unknown or not built for this processor family"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

Capability capability() { return choice().capability; }

const char* cpu_capability(const char** why) {
  *why = choice().why;
  return choice().name;
}

}  // namespace otk

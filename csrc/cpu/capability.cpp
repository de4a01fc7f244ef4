// Which instruction set runs: the best the CPU has, or the one OPENTRANS_CPU_CAPABILITY names.
#include <cstdlib>
#include <cstring>

#include "../otk.h"
#include "isa.h"

namespace otk {
namespace {

struct Choice {
  const Isa* isa = nullptr;
  const char* why = nullptr;
};

bool supported(const Isa& isa) {
#if defined(__x86_64__)
  if (&isa == &isa_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (&isa == &isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  (void)isa;
  return true;
}

Choice choose() {
  const Isa* known[] = {
#if defined(__x86_64__)
      &isa_avx512, &isa_avx2,
#elif defined(__aarch64__)
      &isa_neon,
#endif
      &isa_generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* forced = std::getenv("OPENTRANS_CPU_CAPABILITY");
  if (forced && (!*forced || !std::strcmp(forced, "auto"))) forced = nullptr;
  for (const Isa* isa : known) {
    if (forced && std::strcmp(forced, isa->name) != 0) continue;
    if (supported(*isa)) return {isa, nullptr};
    if (forced) return {nullptr, "this CPU does not support it"};
  }
  return {nullptr, "it is unknown or not built for this processor family"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Isa* active_isa() { return choice().isa; }

const char* cpu_capability(const char** why) {
  *why = choice().why;
  return choice().isa ? choice().isa->name : nullptr;
}

}  // namespace otk

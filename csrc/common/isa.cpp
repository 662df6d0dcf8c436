// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace tokenprune {
namespace {

constexpr const char* kVariable = "TOKENPRUNE_CPU_CAPABILITY";

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kGeneric;
}

Isa choose() {
  const Isa best = detect();
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::strcmp(wanted, isa_name(isa)) == 0) return isa < best ? isa : best;  // never above what the CPU has
  }
  throw std::runtime_error(std::string("tokenprune: ") + kVariable +
                           " must be generic, avx2, avx512 or avx512_bf16, got '" + wanted + "'");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    default: return "generic";
  }
}

}  // namespace tokenprune

// Read by the Python module _C (and by anything that loads the library with dlsym): never throws.
extern "C" __attribute__((visibility("default"))) const char* tokenprune_cpu_capability() noexcept {
  try {
    return tokenprune::isa_name(tokenprune::cpu_isa());
  } catch (const std::exception&) {
    return "invalid TOKENPRUNE_CPU_CAPABILITY";
  }
}

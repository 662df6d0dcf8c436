// SPDX-License-Identifier: Apache-2.0
// Which instruction set serves this process: CPUID once, or TOKENPRUNE_CPU_CAPABILITY (generic, avx2, avx512,
// avx512_bf16) to force a lower one for tests. A set that the CPU lacks gives the best it has; an unknown name throws.
#pragma once

namespace tokenprune {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

Isa cpu_isa();  // the one in use
const char* isa_name(Isa isa);

// Picks this process's entry of a family's tables. Each set's object defines `TABLE_<set>`; float64 is generic only.
#if defined(__x86_64__)
#define TP_DECLARE_TABLES(Table, name)                                               \
  extern const Table name##_generic, name##_avx2, name##_avx512, name##_avx512_bf16; \
  inline const Table& name() {                                                       \
    static const Table& table = cpu_isa() == Isa::kAvx512Bf16 ? name##_avx512_bf16   \
                                : cpu_isa() == Isa::kAvx512   ? name##_avx512        \
                                : cpu_isa() == Isa::kAvx2     ? name##_avx2          \
                                                              : name##_generic;      \
    return table;                                                                    \
  }
#else
#define TP_DECLARE_TABLES(Table, name) \
  extern const Table name##_generic;   \
  inline const Table& name() { return name##_generic; }
#endif

#define TP_CONCAT_INNER(a, b) a##_##b
#define TP_CONCAT(a, b) TP_CONCAT_INNER(a, b)
#define TP_TABLE(name) TP_CONCAT(name, TOKENPRUNE_ISA_SUFFIX)

}  // namespace tokenprune

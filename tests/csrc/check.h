// SPDX-License-Identifier: Apache-2.0
// A few lines of test support for the kernel tests: random values, comparisons, one printed line per case.
//
//   Random random(seed); random.values<T>(n); random.integer(low, high)
//   close(name, got, want, tolerance)   |got - want| <= tolerance * (1 + |want|); NaN equals NaN, infinities by sign
//   equal(name, got, want)              exact
//   kTiny                               true in the ThreadSanitizer build: use one tiny case per kernel
//   return finish();                    prints the summary; the exit status of main
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/common/cuda.h"

namespace tokenprune::test {

#ifdef TOKENPRUNE_TINY
constexpr bool kTiny = true;
#else
constexpr bool kTiny = false;
#endif

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
  }
  int64_t integer(int64_t low, int64_t high) {  // in [low, high]
    return low + static_cast<int64_t>((next() >> 11) % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53 * 2 - 1; }  // in [-1, 1)
  template <typename T>
  std::vector<T> values(int64_t n) {
    std::vector<T> v(n);
    for (T& x : v) x = from_acc<T>(static_cast<Acc<T>>(uniform()));
    return v;
  }
};

inline int& passed() {
  static int value = 0;
  return value;
}
inline int& failed() {
  static int value = 0;
  return value;
}

inline void report(const std::string& name, bool good, const std::string& detail) {
  ++(good ? passed() : failed());
  std::printf("%s  %s%s%s\n", good ? "ok  " : "FAIL", name.c_str(), detail.empty() ? "" : "  ", detail.c_str());
  std::fflush(stdout);
}

template <typename T, typename W>
void close(const std::string& name, const std::vector<T>& got, const std::vector<W>& want, double tolerance) {
  if (got.size() != want.size()) return report(name, false, "sizes differ");
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = static_cast<double>(to_acc(got[i])), w = static_cast<double>(to_acc(want[i]));
    double error = std::fabs(g - w) / (1 + std::fabs(w));
    if (g == w || (g != g && w != w)) error = 0;
    if (!(error <= worst)) worst = error, where = i;
    if (error != error) break;  // NaN on one side only
  }
  const bool good = worst <= tolerance;
  report(name, good,
         good ? ""
              : "index " + std::to_string(where) + ": got " + std::to_string(static_cast<double>(to_acc(got[where]))) +
                    ", want " + std::to_string(static_cast<double>(to_acc(want[where]))) + ", error " +
                    std::to_string(worst));
}

template <typename T>
void equal(const std::string& name, const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) return report(name, false, "sizes differ");
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] != want[i]) {
      return report(
          name, false,
          "index " + std::to_string(i) + ": got " + std::to_string(got[i]) + ", want " + std::to_string(want[i]));
    }
  }
  report(name, true, "");
}

// A vector of T from doubles, rounded once: what a kernel that accumulates wider should store.
template <typename T>
std::vector<T> rounded(const std::vector<double>& v) {
  std::vector<T> r(v.size());
  for (size_t i = 0; i < v.size(); ++i) r[i] = from_acc<T>(static_cast<Acc<T>>(v[i]));
  return r;
}

template <typename T>
constexpr double tolerance() {
  return sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 1e-2;
}

template <typename T>
const char* type_name() {
  if constexpr (sizeof(T) == 8) return "double";
  if constexpr (sizeof(T) == 4) return "float";
  return std::is_same_v<T, __half> ? "half" : "bfloat16";
}

inline int finish() {
  std::printf("%d passed, %d failed\n", passed(), failed());
  return failed() == 0 ? 0 : 1;
}

}  // namespace tokenprune::test

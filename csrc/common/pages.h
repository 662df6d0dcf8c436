// SPDX-License-Identifier: Apache-2.0
// Large results come from fresh pages, and taking them one by one from the system costs more than filling them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tokenprune {

// Asks for 2 MiB pages behind [p, p + bytes) where that is worth a system call, and for the hundreds of small pages
// before and behind them at once: one fault after the other costs more. A hint: nothing depends on it.
inline void prefer_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20, kSmall = 4096;
  constexpr int kPopulate = 23;  // MADV_POPULATE_WRITE, which older headers and systems do not know
  const uintptr_t first = reinterpret_cast<uintptr_t>(p), last = first + bytes;
  const uintptr_t begin = (first + kHuge - 1) / kHuge * kHuge, end = last / kHuge * kHuge;
  if (end < begin + 4 * kHuge) return;
  const auto advise = [](uintptr_t from, uintptr_t to, int advice) {
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, advice);
  };
  advise(begin, end, MADV_HUGEPAGE);
  advise(first / kSmall * kSmall, begin, kPopulate);
  advise(end, (last + kSmall - 1) / kSmall * kSmall, kPopulate);
#endif
}

}  // namespace tokenprune

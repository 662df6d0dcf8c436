// SPDX-License-Identifier: Apache-2.0
// Threads of torch's pool and per-thread scratch memory. Not for cpu_isa.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>

#include "isa.h"

namespace tokenprune {

// Scratch that grows and stays with the thread: fresh temporaries cost more in page faults than the kernels they serve.
// Each slot is a memory of its own.
template <int Slot = 0>
inline char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, size)));
    if (memory == nullptr) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// An exception inside a parallel region reaches Python without its text (torch 2.11), so what f would throw for a wrong
// TOKENPRUNE_CPU_CAPABILITY is thrown before the region by cpu_isa().

// f(item) for every item, handed out one by one: items of ragged batches differ in length. Results must not depend on
// which thread runs an item.
template <typename F>
void parallel_items(int64_t items, int64_t work_per_item, const F& f) {
  constexpr int64_t kMinWork = 50000;  // elementary operations worth waking a thread for
  const int64_t threads = torch::stable::get_num_threads();
  if (items <= 1 || threads <= 1 || items * work_per_item < 2 * kMinWork) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
  cpu_isa();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      for (int64_t i; (i = next.fetch_add(1)) < items;) f(i);
    }
  });
}

// f(begin, end) over contiguous ranges of equal items.
template <typename F>
void parallel_ranges(int64_t items, int64_t work_per_item, const F& f) {
  constexpr int64_t kGrainWork = 50000;
  const int64_t grain = kGrainWork / (work_per_item > 0 ? work_per_item : 1) + 1;
  if (items <= grain) {
    if (items > 0) f(int64_t{0}, items);
    return;
  }
  cpu_isa();
  torch::stable::parallel_for(0, items, grain, f);
}

}  // namespace tokenprune

// SPDX-License-Identifier: Apache-2.0
// An execution model of CUDA on the host: runs an unchanged kernel.cuh on the CPU, with no GPU and no CUDA toolkit.
//
// Build:   g++ -std=c++20 -DTOKENPRUNE_HOST_MODEL -I tests/csrc -I csrc ...        (csrc/common/cuda.h includes this
// file)
//   default                        FIBERS: one fiber per CUDA thread, blocks one after another, deterministic. For
//                                  AddressSanitizer and UBSan. TOKENPRUNE_MODEL_REVERSE=1 in the environment reverses
//                                  the order of blocks and threads: results that change depend on an unordered race.
//   -DTOKENPRUNE_HOST_THREADS      THREADS: one std::thread per CUDA thread. For ThreadSanitizer.
// Launch:  TP_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, args...);      grid, block: int or dim3
//
//          or a host_model::Launcher where a function takes a launcher (csrc/common/launch.h).
//
// What a kernel may use (csrc/common/cuda.h documents the device side):
//   threadIdx blockIdx blockDim gridDim; __syncthreads(); atomicAdd/Min/Max/Or/Exch/CAS on 32-bit integers;
//   TP_SHARED(type, name, [n][m]) for static (declare all at the top) and dynamic_shared<T>() for dynamic shared
//   memory; the wrappers of cuda.h for everything that a warp does together (always the full warp) and for cp.async.
// What the model finds:
//   - a barrier or warp operation not reached by all threads, or reached at different places: error, exit status 70;
//   - reads of shared memory that was not written in this block: it is filled with 0xff (NaN, -1) before each block;
//   - out-of-bounds and misaligned accesses (sanitizers; dynamic shared memory has exactly the size of the launch);
//   - a missing wait for an asynchronous copy: it lands at its wait;
//   - a missing barrier: a data race for ThreadSanitizer. Shuffles, votes and matrix instructions do not order memory
//     (as on hardware), so a race is not hidden by them; __syncthreads and warp_sync do.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <vector>

#include "host_types.h"

namespace tokenprune::host_model {

using Where = std::source_location;

[[noreturn]] inline void fatal(const char* what, const Where& where) {
  std::fprintf(stderr, "host model: %s at %s:%u (block %u,%u,%u thread %u)\n", what, where.file_name(),
               static_cast<unsigned>(where.line()), blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::fflush(stdout);
  std::_Exit(70);
}

// What the lanes of a warp put in and get back; the last lane to arrive computes for all.
constexpr int kInWords = 6, kOutWords = 2;
struct Deposit {
  uint64_t words[kInWords];
};
struct Result {
  uint64_t words[kOutWords];
};
using Collective = void (*)(const Deposit* in, Result* out);

// One block's state that does not depend on the mode.
struct SharedArray {
  const void* address;
  uint64_t block;
};
struct CopyRequest {  // cp.async
  void* to;
  const void* from;
  int bytes, valid, group;
};
struct CopyQueue {
  std::vector<CopyRequest> requests;
  int group = 0;
};

struct BlockState {
  uint64_t serial = 0;  // counts blocks: shared memory is poisoned at the first touch in each
  std::vector<SharedArray> arrays;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> dynamic;
  std::vector<CopyQueue> copies;
  int threads = 0;

  void begin(int thread_count, size_t shared_bytes) {
    ++serial;
    threads = thread_count;
    // A fresh allocation with the exact size, aligned: over-reads hit the sanitizer's red zone.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes) != 0) std::abort();
    dynamic.reset(memory);
    std::memset(memory, 0xff, shared_bytes);
    copies.assign(thread_count, {});
  }
  void enter_shared(void* address, size_t bytes) {
    for (SharedArray& array : arrays) {
      if (array.address == address) {
        if (array.block != serial) {
          array.block = serial;
          std::memset(address, 0xff, bytes);
        }
        return;
      }
    }
    arrays.push_back({address, serial});
    std::memset(address, 0xff, bytes);
  }
};

inline unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

inline bool reversed() {
  static const bool value = [] {
    const char* text = std::getenv("TOKENPRUNE_MODEL_REVERSE");
    return text != nullptr && text[0] == '1';
  }();
  return value;
}

}  // namespace tokenprune::host_model

#ifdef TOKENPRUNE_HOST_THREADS
#include "host_threads.h"
#else
#include "host_fibers.h"
#endif

namespace tokenprune::host_model {

// ---- launch --------------------------------------------------------------------------------------------------------

template <typename Kernel, typename... Args>
void launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 ||
      threads % 32 != 0 || shared_bytes > 227 * 1024) {
    std::fprintf(stderr, "host model: invalid launch of %s: grid %u,%u,%u block %u shared %zu\n", name, grid.x, grid.y,
                 grid.z, threads, shared_bytes);
    std::_Exit(70);
  }
  gridDim = grid;
  blockDim = block;
  const std::function<void()> body = [&] { kernel(args...); };
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = reversed() ? blocks - 1 - i : i;
    const Uint3 index{static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(body, index, static_cast<int>(threads), shared_bytes);
  }
}

#define TP_LAUNCH(kernel, grid, block, shared_bytes, ...) \
  ::tokenprune::host_model::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__)

// The shape of csrc/common/launch.h's Launcher, for functions that issue several launches.
struct Launcher {
  int64_t shared_limit = 227 * 1024;
  int64_t most_shared_bytes() const { return shared_limit; }

  template <typename... Parameters, typename... Args>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) const {
    launch("a kernel", kernel, grid, block, shared_bytes, static_cast<Parameters>(args)...);
  }
};

// ---- asynchronous copies -------------------------------------------------------------------------------------------

inline void copy_async(void* to, const void* from, int bytes, int valid, Where where) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid != 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fatal("misaligned asynchronous copy", where);
  }
  CopyQueue& queue = block_state().copies[linear_thread()];
  queue.requests.push_back({to, from, bytes, valid, queue.group});
}
inline void copy_commit() { ++block_state().copies[linear_thread()].group; }
inline void copy_wait(int pending) {
  CopyQueue& queue = block_state().copies[linear_thread()];
  size_t done = 0;
  for (; done < queue.requests.size() && queue.requests[done].group < queue.group - pending; ++done) {
    const CopyRequest& r = queue.requests[done];
    if (r.valid > 0) std::memcpy(r.to, r.from, r.valid);
    if (r.valid < r.bytes) std::memset(static_cast<char*>(r.to) + r.valid, 0, r.bytes - r.valid);
  }
  queue.requests.erase(queue.requests.begin(), queue.requests.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace tokenprune::host_model

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  tokenprune::host_model::sync_block(where);
}

template <typename T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* p, T v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* p, T v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <typename T>
T atomicMin(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <typename T>
T atomicMax(T* p, T v) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v > old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

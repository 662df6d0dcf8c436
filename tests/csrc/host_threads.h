// SPDX-License-Identifier: Apache-2.0
// THREADS mode of the host model: every CUDA thread of a block is an OS thread. Included by host_model.h.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <mutex>
#include <thread>

namespace tokenprune::host_model {

// Shuffles, votes and matrix instructions do not order memory on hardware. So their exchange uses relaxed atomics and
// bare futex calls only: ThreadSanitizer sees no ordering in them and reports what a real barrier should have ordered.
struct Warp {
  std::atomic<uint64_t> in[32][kInWords];
  std::atomic<uint64_t> out[32][kOutWords];
  std::atomic<uint32_t> arrived{0}, generation{0};
  std::atomic<Collective> operation{nullptr};
  pthread_barrier_t barrier;
};

// The OS threads of one block size; they live on from block to block (starting threads is slow under the sanitizer).
// The start and finish barriers order a block after what came before, as a launch does.
struct Pool {
  explicit Pool(int count) : size(count) {
    pthread_barrier_init(&start, nullptr, count + 1);
    pthread_barrier_init(&finish, nullptr, count + 1);
    pthread_barrier_init(&block, nullptr, count);
    for (int t = 0; t < count; ++t) threads.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    body = nullptr;
    pthread_barrier_wait(&start);
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&start);
    pthread_barrier_destroy(&finish);
    pthread_barrier_destroy(&block);
  }
  void work(unsigned t) {
    for (;;) {
      pthread_barrier_wait(&start);
      if (body == nullptr) return;
      blockIdx = index;
      threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      (*body)();
      pthread_barrier_wait(&finish);
    }
  }

  int size;
  const std::function<void()>* body = nullptr;
  Uint3 index;
  pthread_barrier_t start, finish, block;
  std::vector<std::thread> threads;
};

struct Machine {
  BlockState block;
  std::mutex mutex;
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<Pool> pool;
};

inline Machine& machine() {
  static Machine value;
  return value;
}
inline BlockState& block_state() { return machine().block; }

inline void run_block(const std::function<void()>& body, Uint3 index, int threads, size_t shared_bytes) {
  Machine& m = machine();
  if (m.pool == nullptr || m.pool->size != threads) {
    m.pool.reset();
    m.pool = std::make_unique<Pool>(threads);
  }
  m.block.begin(threads, shared_bytes);
  m.warps = std::make_unique<Warp[]>(threads / 32);
  for (int w = 0; w < threads / 32; ++w) pthread_barrier_init(&m.warps[w].barrier, nullptr, 32);
  m.pool->body = &body;
  m.pool->index = index;
  pthread_barrier_wait(&m.pool->start);
  pthread_barrier_wait(&m.pool->finish);
  for (int w = 0; w < threads / 32; ++w) pthread_barrier_destroy(&m.warps[w].barrier);
}

inline void sync_block(Where) { pthread_barrier_wait(&machine().pool->block); }
inline void sync_warp(Where) { pthread_barrier_wait(&machine().warps[linear_thread() / 32].barrier); }

inline Result collective(Collective operation, const Deposit& deposit, Where where) {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  const unsigned lane = linear_thread() % 32;
  Warp& warp = machine().warps[linear_thread() / 32];
  for (int i = 0; i < kInWords; ++i) warp.in[lane][i].store(deposit.words[i], kRelaxed);
  const uint32_t generation = warp.generation.load(kRelaxed);
  const uint32_t arrived = warp.arrived.fetch_add(1, kRelaxed);
  if (arrived == 0) warp.operation.store(operation, kRelaxed);
  if (arrived == 31) {
    if (warp.operation.load(kRelaxed) != operation) fatal("lanes of a warp meet at different operations", where);
    Deposit in[32];
    Result out[32];
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < kInWords; ++i) in[l].words[i] = warp.in[l][i].load(kRelaxed);
    }
    operation(in, out);
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < kOutWords; ++i) warp.out[l][i].store(out[l].words[i], kRelaxed);
    }
    warp.arrived.store(0, kRelaxed);
    warp.generation.store(generation + 1, kRelaxed);
    syscall(SYS_futex, &warp.generation, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  } else {
    while (warp.generation.load(kRelaxed) == generation) {
      syscall(SYS_futex, &warp.generation, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
    }
  }
  Result result;
  for (int i = 0; i < kOutWords; ++i) result.words[i] = warp.out[lane][i].load(kRelaxed);
  return result;
}

// The first thread of a block to arrive fills the array; the lock orders the fill before everyone's use.
inline void enter_shared(void* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  machine().block.enter_shared(address, bytes);
}

}  // namespace tokenprune::host_model

// SPDX-License-Identifier: Apache-2.0
// FIBERS mode of the host model: every CUDA thread of a block is a fiber of one OS thread. Included by host_model.h.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tokenprune::host_model {

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context{};
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's handle while the fiber is suspended
  Uint3 index;
  State state = State::kDone;
};

struct Warp {
  Deposit in[32];
  Result out[32];
  Collective operation = nullptr;
  Where where;
  int arrived = 0;
};

struct Machine {
  static constexpr size_t kStack = 256 * 1024;
  BlockState block;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Fiber scheduler;
  int current = -1;  // running fiber; -1: the scheduler
  int at_barrier = 0;
  Where barrier_where;
  const std::function<void()>* body = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
};

inline Machine& machine() {
  static Machine value;
  return value;
}
inline BlockState& block_state() { return machine().block; }

// Leaves the running fiber and continues `next` (-1: the scheduler).
inline void switch_to(int next) {
  Machine& m = machine();
  Fiber& from = m.current < 0 ? m.scheduler : *m.fibers[m.current];
  Fiber& to = next < 0 ? m.scheduler : *m.fibers[next];
  m.current = next;
  if (next >= 0) threadIdx = to.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, next < 0 ? m.main_bottom : to.stack,
                                 next < 0 ? m.main_size : Machine::kStack);
#endif
  swapcontext(&from.context, &to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The next fiber that can run, in round robin order; the scheduler when there is none.
inline void yield() {
  Machine& m = machine();
  const int n = m.block.threads, step = reversed() ? n - 1 : 1;
  int candidate = m.current;
  for (int i = 0; i < n; ++i) {
    candidate = (candidate + step) % n;
    if (m.fibers[candidate]->state == State::kReady) {
      if (candidate != m.current) switch_to(candidate);
      return;
    }
  }
  switch_to(-1);
}

inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (m.main_bottom == nullptr) m.main_bottom = bottom, m.main_size = size;  // the first fiber is entered from main
#endif
  for (;;) {  // a fiber serves one thread of every block
    (*m.body)();
    m.fibers[m.current]->state = State::kDone;
    yield();
  }
}

inline void run_block(const std::function<void()>& body, Uint3 index, int threads, size_t shared_bytes) {
  Machine& m = machine();
  m.block.begin(threads, shared_bytes);
  m.body = &body;
  blockIdx = index;
  m.warps.assign(threads / 32, {});
  m.at_barrier = 0;
  while (static_cast<int>(m.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, Machine::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = Machine::kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &fiber_main, 0);
    m.fibers.push_back(std::move(fiber));
  }
  for (int t = 0; t < threads; ++t) {
    const unsigned x = t % blockDim.x, y = t / blockDim.x % blockDim.y, z = t / blockDim.x / blockDim.y;
    m.fibers[t]->index = {x, y, z};
    m.fibers[t]->state = State::kReady;
  }
  switch_to(reversed() ? threads - 1 : 0);
  for (int t = 0; t < threads; ++t) {
    threadIdx = m.fibers[t]->index;
    if (m.fibers[t]->state == State::kAtBlock) fatal("__syncthreads not reached by every thread", m.barrier_where);
    if (m.fibers[t]->state == State::kAtWarp) {
      fatal("a warp operation was not reached by every lane", m.warps[t / 32].where);
    }
  }
}

inline void sync_block(Where where) {
  Machine& m = machine();
  if (m.at_barrier == 0) m.barrier_where = where;
  if (m.barrier_where.line() != where.line()) fatal("threads meet at different __syncthreads", where);
  if (++m.at_barrier == m.block.threads) {
    m.at_barrier = 0;
    for (int t = 0; t < m.block.threads; ++t) m.fibers[t]->state = State::kReady;
    return;
  }
  m.fibers[m.current]->state = State::kAtBlock;
  yield();
}

inline Result collective(Collective operation, const Deposit& deposit, Where where) {
  Machine& m = machine();
  Warp& warp = m.warps[m.current / 32];
  const int lane = m.current % 32;
  if (warp.arrived == 0) warp.operation = operation, warp.where = where;
  if (warp.operation != operation || warp.where.line() != where.line()) {
    fatal("lanes of a warp meet at different operations", where);
  }
  warp.in[lane] = deposit;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    operation(warp.in, warp.out);
    const int first = m.current - lane;
    for (int t = first; t < first + 32; ++t) m.fibers[t]->state = State::kReady;
  } else {
    m.fibers[m.current]->state = State::kAtWarp;
    yield();
  }
  return warp.out[lane];
}

inline void sync_warp(Where where) {
  collective([](const Deposit*, Result*) {}, {}, where);
}

inline void enter_shared(void* address, size_t bytes) { machine().block.enter_shared(address, bytes); }

}  // namespace tokenprune::host_model

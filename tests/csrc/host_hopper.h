// SPDX-License-Identifier: Apache-2.0
// The host side of csrc/common/hopper.cuh: mbarriers, the tensor copy engine and wgmma on the host model.
//
// Asynchronous work is done as late as allowed: a copy lands when somebody who waits for its barrier looks at it, a
// wgmma runs in its wgmma_wait. With TOKENPRUNE_MODEL_REVERSE=1 it is done as early as possible, when issued. So a
// missing wait shows in the first order, and a stage that is overwritten or a register that is changed too early in one
// of them. Addresses in shared memory count from the start of the block's dynamic shared memory, as descriptors need.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "host_model.h"

namespace tokenprune::hopper {

using host_model::fatal;
using host_model::Where;
using Barrier = uint64_t;

// dims[0] is contiguous. Strides in bytes of dimensions 1 and 2. Boxes have 1 in dimension 1.
struct TensorMap {
  const void* data = nullptr;
  int64_t dims[3] = {}, strides[3] = {};
  int box_columns = 0, box_rows = 0;
  Swizzle swizzle = Swizzle::k128;
};

struct TileCopy {
  TensorMap map;  // a copy: here every thread has parameters of its own, and may end before the tile lands
  int to, at[3];
};

inline char* shared_base() { return static_cast<char*>(host_model::block_state().dynamic.get()); }
inline uint32_t shared_address_of(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_base());
}

// Per 16 bytes of shared memory: 1 + the thread whose ordinary store or cp.async there has not passed its
// fence_async_shared yet. What wgmma reads must be 0.
struct Unfenced {
  std::atomic<uint64_t> block{0};
  std::array<std::atomic<uint16_t>, 228 * 64> owner{};
};
inline Unfenced& unfenced() {
  static Unfenced value;
  static std::mutex mutex;
  if (value.block != host_model::block_state().serial) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (value.block != host_model::block_state().serial) {
      for (auto& owner : value.owner) owner = 0;
      value.block = host_model::block_state().serial;
    }
  }
  return value;
}
inline void mark_unfenced(const void* to) {
  unfenced().owner[shared_address_of(to) / 16].store(static_cast<uint16_t>(host_model::linear_thread() + 1),
                                                     std::memory_order_relaxed);
}
inline void fence_async_shared() {
  for (auto& owner : unfenced().owner) {
    uint16_t mine = static_cast<uint16_t>(host_model::linear_thread() + 1);
    owner.compare_exchange_strong(mine, 0, std::memory_order_relaxed);
  }
}
inline void store_unit(void* to, const uint4& v) {
  std::memcpy(to, &v, 16);
  mark_unfenced(to);
}
inline void copy_unit(void* to, const void* from, bool valid, Where where = Where::current()) {
  copy_async<16>(to, from, valid, where);
  mark_unfenced(to);
}

inline void land(const TileCopy& copy) {
  const TensorMap& m = copy.map;
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; ++c) {
      const int64_t at[3] = {copy.at[0] + c, copy.at[1], copy.at[2] + r};
      bool inside = true;
      for (int d = 0; d < 3; ++d) inside = inside && at[d] >= 0 && at[d] < m.dims[d];
      uint16_t value = 0;
      if (inside) {
        std::memcpy(&value, static_cast<const char*>(m.data) + at[0] * 2 + at[1] * m.strides[1] + at[2] * m.strides[2],
                    2);
      }
      std::memcpy(shared_base() + swizzled(copy.to + (r * m.box_columns + c) * 2, m.swizzle), &value, 2);
    }
  }
}

// ---- barriers ------------------------------------------------------------------------------------------------------

struct BarrierState {
  std::mutex mutex;
  int arrivals = 0, pending = 0;
  int64_t expected = 0, issued = 0;
  uint64_t phase = 0;
  std::vector<TileCopy> copies;

  // Ends the phase when everyone arrived and all announced bytes are on their way. `look`: by somebody who waits.
  void settle(bool look) {
    if (pending != 0 || expected != issued || (!copies.empty() && !look && !host_model::reversed())) return;
    for (const TileCopy& copy : copies) land(copy);
    copies.clear();
    expected = issued = 0, pending = arrivals, ++phase;
  }
};

struct Barriers {
  std::atomic<uint64_t> block{0};
  std::mutex mutex;
  std::map<const void*, BarrierState> states;
  std::map<int, BarrierState> named;
  std::atomic<int64_t> idle{0};  // looks since the last arrival
};
inline Barriers& barriers() {
  static Barriers value;
  if (value.block != host_model::block_state().serial) {
    const std::lock_guard<std::mutex> lock(value.mutex);
    if (value.block != host_model::block_state().serial) {
      value.states.clear(), value.named.clear(), value.idle = 0;
      value.block = host_model::block_state().serial;
    }
  }
  return value;
}
inline BarrierState& state_of(Barrier* b, const Where& where) {
  Barriers& all = barriers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.states.find(b);
  if (found == all.states.end()) fatal("barrier used before barrier_init", where);
  return found->second;
}

inline void pause(const char* what, const Where& where) {
  constexpr int64_t kHopeless = 3000000;
  if (++barriers().idle > kHopeless) fatal(what, where);
#ifdef TOKENPRUNE_HOST_THREADS
  std::this_thread::yield();
#else
  host_model::yield();
#endif
}

inline void barrier_init(Barrier* b, int arrivals) {
  Barriers& all = barriers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  BarrierState& state = all.states[b];
  state.arrivals = state.pending = arrivals;
}
inline void barrier_init_fence() {}

inline void arrive(BarrierState& state, int bytes, const Where& where) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.pending == 0) fatal("more arrivals at a barrier than it was made for", where);
  state.expected += bytes;
  --state.pending;
  barriers().idle = 0;
  state.settle(false);
}
inline void barrier_arrive(Barrier* b, Where where = Where::current()) { arrive(state_of(b, where), 0, where); }
inline void barrier_expect(Barrier* b, int bytes, Where where = Where::current()) {
  arrive(state_of(b, where), bytes, where);
}
inline void barrier_wait(Barrier* b, int parity, Where where = Where::current()) {
  BarrierState& state = state_of(b, where);
  for (;;) {
    {
      const std::lock_guard<std::mutex> lock(state.mutex);
      state.settle(true);
      if (static_cast<int>(state.phase & 1) != parity) return;
    }
    pause("a barrier that nobody completes", where);
  }
}

inline void group_sync(int id, int threads, Where where = Where::current()) {
  Barriers& all = barriers();
  all.mutex.lock();
  BarrierState& state = all.named[id];
  all.mutex.unlock();
  uint64_t phase;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (state.arrivals == 0) state.arrivals = state.pending = threads;
    if (state.arrivals != threads) fatal("group_sync with different numbers of threads", where);
    phase = state.phase;
    --state.pending;
    all.idle = 0;
    state.settle(false);
  }
  for (;;) {
    {
      const std::lock_guard<std::mutex> lock(state.mutex);
      if (state.phase != phase) return;
    }
    pause("group_sync not reached by all threads", where);
  }
}

// ---- copies --------------------------------------------------------------------------------------------------------

inline void copy_tile(const TensorMap* map, Barrier* b, void* to, int c0, int c1, int c2,
                      Where where = Where::current()) {
  const uint32_t address = shared_address_of(to);
  if (address % (map->swizzle == Swizzle::k128 ? 1024 : 256) != 0) fatal("misaligned tile", where);
  if (map->box_columns * 2 != (map->swizzle == Swizzle::k128 ? 128 : 32)) fatal("a row of a box is one span", where);
  BarrierState& state = state_of(b, where);
  const std::lock_guard<std::mutex> lock(state.mutex);
  const TileCopy copy{*map, static_cast<int>(address), {c0, c1, c2}};
  state.issued += int64_t{map->box_rows} * map->box_columns * 2;
  if (state.issued > state.expected) fatal("more bytes copied than announced", where);
  if (host_model::reversed()) {
    land(copy);
  } else {
    state.copies.push_back(copy);
  }
  state.settle(false);
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

struct Operand {  // a matrix descriptor, read back
  int address, leading, stride;
  Swizzle swizzle;

  explicit Operand(uint64_t d)
      : address(static_cast<int>(d & 0x3fff) << 4),
        leading(static_cast<int>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<int>(d >> 32 & 0x3fff) << 4),
        swizzle(static_cast<Swizzle>(d >> 62)) {}
  int span() const { return swizzle == Swizzle::k128 ? 128 : 32; }  // bytes of a row
  uint16_t at(int byte) const {
    if (unfenced().owner[swizzled(byte, swizzle) / 16].load(std::memory_order_relaxed) != 0) {
      fatal("wgmma reads what was stored without fence_async_shared", Where::current());
    }
    uint16_t value;
    std::memcpy(&value, shared_base() + swizzled(byte, swizzle), 2);
    return value;
  }
  // Rows whose 16 columns are summed over: 8 rows side by side, the next 8 `stride` further.
  uint16_t row_major(int row, int k) const { return at(address + row / 8 * stride + row % 8 * span() + k * 2); }
  // Rows are summed over: `span` bytes of columns, the next ones `leading` further; 8 rows, the next 8 `stride`
  // further.
  uint16_t column_major(int k, int column) const {
    const int per_span = span() / 2;
    return at(address + column / per_span * leading + column % per_span * 2 + k / 8 * stride + k % 8 * span());
  }
};

struct Product {
  float* d;
  uint64_t a, b;
  const uint32_t* registers;  // or null: A from shared memory
  bool add;
  int columns, group;
  Order order;
  float (*widen)(uint16_t);
  Where where;
};
struct Queue {
  std::vector<Product> products;
  int group = 0;
  uint64_t block = 0;
};
inline Queue& queue_of_thread() {
  static std::vector<Queue> queues(1024);
  Queue& queue = queues[host_model::linear_thread()];
  if (queue.block != host_model::block_state().serial) queue = {{}, 0, host_model::block_state().serial};
  return queue;
}

inline void run(const Product& p) {
  float a[2][kStep];  // this thread's two rows
  if (p.registers != nullptr) {
    // A row is spread over the four lanes of a quad.
    const int first = lane() / 4 * 4;
    uint64_t words[2];
    std::memcpy(words, p.registers, 16);
    for (int t = 0; t < 4; ++t) {
      for (int w = 0; w < 2; ++w) {
        const uint64_t word = host_model::shuffle(words[w], first + t, p.where);
        for (int i = 0; i < 2; ++i) {
          for (int e = 0; e < 2; ++e) {
            a[i][8 * w + 2 * t + e] = p.widen(static_cast<uint16_t>(word >> (32 * i + 16 * e)));
          }
        }
      }
    }
  } else {
    const Operand source(p.a);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < kStep; ++k) a[i][k] = p.widen(source.row_major(row_of(i), k));
    }
  }
  const Operand source(p.b);
  for (int j = 0; j < p.columns / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      float sum[2] = {};
      for (int k = 0; k < kStep; ++k) {
        const int column = column_of(j, e);
        const float b = p.widen(p.order == Order::kRows ? source.row_major(column, k) : source.column_major(k, column));
        for (int i = 0; i < 2; ++i) sum[i] += a[i][k] * b;
      }
      for (int i = 0; i < 2; ++i) {
        float& d = p.d[4 * j + 2 * i + e];
        d = p.add ? d + sum[i] : sum[i];
      }
    }
  }
}

template <typename T>
float widen(uint16_t bits) {
  return host_model::widened(T{bits});
}
inline void enqueue(const Product& product) {
  if (host_model::reversed()) {
    run(product);
  } else {
    queue_of_thread().products.push_back(product);
  }
}
inline void wgmma_fence() {}
inline void wgmma_commit() { ++queue_of_thread().group; }
template <int Pending>
void wgmma_wait() {
  Queue& queue = queue_of_thread();
  size_t done = 0;
  for (; done < queue.products.size() && queue.products[done].group < queue.group - Pending; ++done) {
    run(queue.products[done]);
  }
  queue.products.erase(queue.products.begin(), queue.products.begin() + static_cast<std::ptrdiff_t>(done));
}
template <typename T, int N, Order O>
void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, Where where = Where::current()) {
  enqueue({d, a, b, nullptr, add, N, queue_of_thread().group, O, &widen<T>, where});
}
template <typename T, int N, Order O>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, Where where = Where::current()) {
  enqueue({d, 0, b, a, add, N, queue_of_thread().group, O, &widen<T>, where});
}
template <int N>
void pin(float (&)[N]) {}

template <int N>
void registers_down() {}
template <int N>
void registers_up() {}

}  // namespace tokenprune::hopper

namespace tokenprune {
inline uint32_t shared_address(const void* p) { return hopper::shared_address_of(p); }
}  // namespace tokenprune

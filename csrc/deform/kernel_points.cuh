// SPDX-License-Identifier: Apache-2.0
// What the forward (kernel.cuh) and the backward (kernel_backward.cuh) of deformable attention share: levels, the order
// of the queries, and the points of a pair.
//
// A pair (query, head) belongs to 2^log_lanes neighbouring lanes of one warp, each with 16 bytes of the channels. First
// these lanes turn the pair's points into four corner weights and four places each, in shared memory (softmax and
// location arithmetic happen once per pair); then every lane walks over the points with four 16-byte loads. More than
// kMostChunk points are handled in chunks, so any number of them fits.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "math.h"
#include "params.h"

namespace tokenprune {

constexpr int kMostChunk = 16;    // points of a pair in shared memory at a time
constexpr int kTileRows = 8;      // height of a tile of queries
constexpr int kLevelArgs = 8;     // levels from the host that travel as a kernel argument
constexpr int kMostLevels = 512;  // levels that fit beside the points in shared memory
constexpr int64_t kMostGridY = 65535;

// ---- levels

// From the host (shapes is null), or in device memory.
struct LevelArgs {
  Level level[kLevelArgs];
  const int64_t *shapes = nullptr, *starts = nullptr;
};

struct alignas(16) LevelBox {  // in shared memory; 0 x 0 when the level does not lie within the tokens
  int32_t height, width, start, unused;
};

__device__ __forceinline__ void load_levels(const DeformParams& p, const LevelArgs& args, LevelBox* boxes) {
  for (int64_t l = threadIdx.x; l < p.levels; l += blockDim.x) {
    Level level;
    if (args.shapes != nullptr) {
      level.height = args.shapes[2 * l], level.width = args.shapes[2 * l + 1], level.start = args.starts[l];
    } else {
      level = args.level[l];
    }
    LevelBox box{};
    if (level_fits(level.height, level.width, level.start, p.tokens)) {
      box.height = static_cast<int32_t>(level.height), box.width = static_cast<int32_t>(level.width);
      box.start = static_cast<int32_t>(level.start);
    }
    boxes[l] = box;
  }
  __syncthreads();
}

// More levels than kLevelArgs go to device memory first, by launches that carry them: a captured graph keeps them.
template <int Block>
__global__ void __launch_bounds__(Block, 1) store_levels(LevelArgs args, int64_t* shapes, int64_t* starts, int count) {
  for (int l = threadIdx.x; l < count; l += Block) {
    shapes[2 * l] = args.level[l].height, shapes[2 * l + 1] = args.level[l].width, starts[l] = args.level[l].start;
  }
}

// Workspace, used by more than kLevelArgs levels of the host only: 3 * levels numbers.
template <typename Launch>
LevelArgs level_args(const Launch& launch, const DeformParams& p, int64_t* workspace) {
  LevelArgs args;
  args.shapes = p.shapes, args.starts = p.starts;
  if (p.level == nullptr) return args;
  for (int64_t first = 0; first < p.levels; first += kLevelArgs) {
    const int64_t rest = p.levels - first, count = rest < kLevelArgs ? rest : kLevelArgs;
    for (int64_t l = 0; l < count; ++l) args.level[l] = p.level[first + l];
    if (p.levels <= kLevelArgs) return args;
    launch(&store_levels<32>, 1, 32, 0, args, workspace + 2 * first, workspace + 2 * p.levels + first,
           static_cast<int>(count));
  }
  if (p.levels > kLevelArgs) args.shapes = workspace, args.starts = workspace + 2 * p.levels;
  return args;
}

// ---- pairs

// Division of numbers below 2^31 by a constant, as a multiplication.
struct Divider {
  uint32_t divisor = 1, multiplier = uint32_t{1} << 31;
  int shift = 31;

  Divider() = default;
  explicit Divider(int64_t d) {  // d < 2^31; nothing is divided by zero, 1 stands for it
    if (d < 1) d = 1;
    divisor = static_cast<uint32_t>(d);
    while (int64_t{1} << (shift - 31) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __host__ __device__ __forceinline__ uint32_t operator()(uint32_t number) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(number) * multiplier >> shift);
  }
};

__device__ __forceinline__ int64_t image_of(const DeformParams& p, int64_t bm) {  // both are below 2^31
  return static_cast<uint32_t>(bm) / static_cast<uint32_t>(p.heads);
}

struct DeformTile {
  int log_lanes = 2, chunk = 0;
  Divider points;
  __host__ __device__ __forceinline__ int pairs() const { return kBlock >> log_lanes; }
  __host__ __device__ __forceinline__ int pitch() const { return chunk | 1; }  // odd: no bank conflicts between pairs
};

// At least four lanes: they share the work on the points, and the backward reduces four dot products at once.
inline DeformTile deform_tile(const DeformParams& p, int width) {
  DeformTile tile;
  tile.points = Divider(p.points);
  const int log_lanes = log_lanes_for((p.dim + width - 1) / width);
  if (log_lanes > tile.log_lanes) tile.log_lanes = log_lanes;
  const int64_t points = p.levels * p.points, chunks = (points + kMostChunk - 1) / kMostChunk;
  tile.chunk = static_cast<int>(chunks > 0 ? (points + chunks - 1) / chunks : 0);
  return tile;
}

inline dim3 deform_grid(const DeformParams& p, const DeformTile& tile) {
  const int64_t tiles = (p.queries + tile.pairs() - 1) / tile.pairs(), rows = p.batch * p.heads;
  return dim3(tiles, rows < kMostGridY ? rows : kMostGridY);
}

// Dynamic shared memory: `arrays` x [pairs][pitch] of four stat values, one of four places, and the levels.
template <typename A>
struct DeformShared {
  Pack<A, 4>* values;
  Pack<uint32_t, 4>* places;
  LevelBox* levels;

  __device__ __forceinline__ DeformShared(const DeformTile& tile, int arrays) {
    const int slots = tile.pairs() * tile.pitch();
    values = dynamic_shared<Pack<A, 4>>();
    places = reinterpret_cast<Pack<uint32_t, 4>*>(values + arrays * slots);
    levels = reinterpret_cast<LevelBox*>(places + slots);
  }
  static size_t bytes(const DeformTile& tile, int arrays, int64_t levels) {
    const size_t slots = static_cast<size_t>(tile.pairs()) * tile.pitch();
    return slots * (arrays * sizeof(Pack<A, 4>) + sizeof(Pack<uint32_t, 4>)) + levels * sizeof(LevelBox);
  }
};

// The grid of queries that query i lies in, from `first` on; width 0: unknown.
struct QueryGrid {
  int32_t first, height, width;
};

// Queries are often the pixels of one level, of all levels (an encoder), or, over one level, of the pyramid of twice,
// equal and half its size (a ViT adapter). A wrong guess only costs speed: every answer orders all the queries.
__device__ __forceinline__ QueryGrid query_grid(const LevelBox* levels, int64_t count, int64_t queries, int64_t i) {
  QueryGrid grid{};
  int64_t total = 0, area = 0;
  for (int64_t l = 0; l < count; ++l) {
    const int32_t height = levels[l].height, width = levels[l].width;
    area = static_cast<int64_t>(height) * width;
    if (area == queries) return {0, height, width};
    if (i >= total && i < total + area) grid = {static_cast<int32_t>(total), height, width};
    total += area;
  }
  if (total == queries) return grid;
  if (count != 1 || area == 0) return {};
  const int32_t height = levels[0].height, width = levels[0].width, low = height / 2, narrow = width / 2;
  if (5 * area + static_cast<int64_t>(low) * narrow != queries) return {};
  if (i < 4 * area) return {0, 2 * height, 2 * width};
  if (i < 5 * area) return {static_cast<int32_t>(4 * area), height, width};
  return {static_cast<int32_t>(5 * area), low, narrow};
}

// The i-th query in an order that takes a grid in bands of kTileRows rows, column by column: the pairs of a block are
// then neighbours in both directions and read the same pixels.
__device__ __forceinline__ int64_t query_at(const LevelBox* levels, int64_t count, int64_t queries, int64_t i) {
  const QueryGrid grid = query_grid(levels, count, queries, i);
  if (grid.width <= 0) return i;
  const uint32_t in_grid = static_cast<uint32_t>(i) - grid.first, width = grid.width;
  const uint32_t y = in_grid / (kTileRows * width) * kTileRows, in_band = in_grid - y * width;
  const uint32_t left = grid.height - y, rows = left < kTileRows ? left : kTileRows, x = in_band / rows;
  return grid.first + static_cast<int64_t>(y + in_band - x * rows) * width + x;
}

struct DeformLane {
  int lanes, lane, group;
  bool active;  // its pair exists
  int64_t query;

  __device__ __forceinline__ DeformLane(const DeformParams& p, const DeformTile& tile, const LevelBox* levels) {
    lanes = 1 << tile.log_lanes, lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> tile.log_lanes;
    const int64_t place = static_cast<int64_t>(blockIdx.x) * tile.pairs() + group;
    active = place < p.queries;
    query = active ? query_at(levels, p.levels, p.queries, place) : 0;
  }
  // Of a ballot over the warp, the bits of this pair's lanes.
  __device__ __forceinline__ uint32_t mine(uint32_t ballot) const {
    return ballot >> (threadIdx.x % 32 - lane) & (0xffffffffu >> (32 - lanes));
  }
  template <typename A>
  __device__ __forceinline__ A sum(A v) const {
    for (int mask = 1; mask < lanes; mask *= 2) v += warp_shuffle_xor(v, mask);
    return v;
  }
};

// ---- points

__device__ __forceinline__ float floor_of(float v) { return floorf(v); }
__device__ __forceinline__ double floor_of(double v) { return floor(v); }

// A point within its level.
template <typename A>
struct Sample {
  A fx = 0, fy = 0;
  int32_t x = 0, y = 0, width = 0, row = 0;  // row of corner (y, x); that corner may be outside
  uint32_t reads = 0;                        // bits 0..3: corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1) exist

  __device__ __forceinline__ int32_t corner(int k) const { return row + (k & 1) + (k >> 1) * width; }

  // Rows to load, as places in units of `pitch` per row: an absent corner repeats one that is read anyway, so that a
  // NaN elsewhere stays out. Only if `reads`.
  __device__ __forceinline__ Pack<uint32_t, 4> places(uint32_t pitch) const {
    const int32_t spare = corner(lowest_bit(reads));
    Pack<uint32_t, 4> r;
#pragma unroll
    for (int k = 0; k < 4; ++k) r.v[k] = static_cast<uint32_t>(reads >> k & 1 ? corner(k) : spare) * pitch;
    return r;
  }
  __device__ __forceinline__ Pack<A, 4> weights(A weight) const {
    const CornerWeights<A> w = corner_weights(fx, fy, weight);
    return {{reads & 1 ? w.w00 : A(0), reads & 2 ? w.w01 : A(0), reads & 4 ? w.w10 : A(0), reads & 8 ? w.w11 : A(0)}};
  }
};

// The points of one pair.
template <typename T, bool Fused>
struct PairPoints {
  using A = Acc<T>;
  const DeformParams& p;
  const DeformTile& tile;
  int64_t location, weight;             // the pair's first element
  const A* reference = nullptr;         // of its query
  const bool* mask = nullptr;           // of its image
  A largest = -A(INFINITY), scale = 1;  // softmax

  __device__ __forceinline__ PairPoints(const DeformParams& params, const DeformTile& t, int64_t b, int64_t m,
                                        const DeformLane& lane)
      : p(params), tile(t) {
    const int64_t points = p.levels * p.points, q = lane.query;
    location = b * p.locations.batch_stride + q * p.locations.query_stride + m * points * 2;
    weight = b * p.weights.batch_stride + q * p.weights.query_stride + m * points;
    if (p.mask != nullptr) mask = p.mask + b * p.tokens;
    if constexpr (Fused) {
      reference = static_cast<const A*>(p.reference.data) + b * p.reference.batch_stride + q * p.reference.query_stride;
      prepare_softmax(static_cast<int>(points), lane);
    }
  }

  __device__ __forceinline__ A load(const void* data, int64_t i) const {
    if (Fused && p.offsets_are_values) return to_acc(at<T>(data, i));
    return at<A>(data, i);
  }
  __device__ __forceinline__ A power(A logit) const { return exp2_fast((logit - largest) * A(1.4426950408889634)); }

  __device__ __forceinline__ void prepare_softmax(int points, const DeformLane& lane) {
    const int end = lane.active ? points : 0;
    for (int i = lane.lane; i < end; i += lane.lanes) {
      const A logit = load(p.weights.data, weight + i);
      largest = logit > largest ? logit : largest;
    }
    for (int mask = 1; mask < lane.lanes; mask *= 2) {
      const A other = warp_shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    A total = 0;
    for (int i = lane.lane; i < end; i += lane.lanes) total += power(load(p.weights.data, weight + i));
    scale = A(1) / lane.sum(total);
  }

  __device__ __forceinline__ A attention(int i) const {
    const A v = load(p.weights.data, weight + i);
    return Fused ? power(v) * scale : v;
  }
  __device__ __forceinline__ A offset(int i, int axis) const { return load(p.locations.data, location + 2 * i + axis); }
  __device__ __forceinline__ A reference_at(int level, int column) const {
    return reference[(p.reference_levels == 1 ? 0 : level) * p.reference_columns + column];
  }
  // Pixel coordinate along x (axis 0) or y (axis 1).
  __device__ __forceinline__ A pixel(int i, int level, int axis, int32_t size) const {
    const A given = offset(i, axis), extent = static_cast<A>(size);
    if constexpr (!Fused) return pixel_of_location(given, extent);
    if (p.reference_columns == 2) return pixel_of_offset(reference_at(level, axis), given, extent);
    return pixel_of_box_offset(reference_at(level, axis), reference_at(level, 2 + axis), given,
                               A(1) / static_cast<A>(p.points), extent);
  }

  __device__ __forceinline__ int level_of(int i) const { return static_cast<int>(tile.points(i)); }

  __device__ __forceinline__ Sample<A> sample(int i, const LevelBox* levels) const {
    Sample<A> s;
    const int level = level_of(i);
    const LevelBox box = levels[level];
    const A x = pixel(i, level, 0, box.width), y = pixel(i, level, 1, box.height);
    if (!point_reads(x, y, static_cast<A>(box.width), static_cast<A>(box.height))) return s;
    const A left = floor_of(x), top = floor_of(y);
    s.fx = x - left, s.fy = y - top;
    s.x = static_cast<int32_t>(left), s.y = static_cast<int32_t>(top);
    s.width = box.width, s.row = box.start + s.y * box.width + s.x;
    // A width beyond 2^24 may have been rounded up, so both ends are tested on both sides.
    const bool in_left = s.x >= 0 && s.x < box.width, in_right = s.x + 1 < box.width;
    const bool in_top = s.y >= 0 && s.y < box.height, in_bottom = s.y + 1 < box.height;
    s.reads =
        (in_top && in_left) | (in_top && in_right) << 1 | (in_bottom && in_left) << 2 | (in_bottom && in_right) << 3;
    for (uint32_t bits = mask != nullptr ? s.reads : 0; bits != 0; bits &= bits - 1) {
      const int k = lowest_bit(bits);
      if (mask[s.corner(k)]) s.reads &= ~(1u << k);
    }
    return s;
  }
};

// The whole product of two 32-bit numbers. Left to itself the compiler forgets that the factors are short, and an
// address takes three instructions instead of one.
#ifdef TOKENPRUNE_HOST_MODEL
inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
#else
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t r;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(r) : "r"(a), "r"(b));
  return r;
}
#endif

// to_acc of a whole pack. Two bfloat16 become floats by one instruction each, if the word is not taken apart first.
template <typename T, int W>
__device__ __forceinline__ void widen(const Pack<T, W>& pack, Acc<T> (&out)[W]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && W % 2 == 0) {
    uint32_t words[W / 2], wide[W];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int i = 0; i < W / 2; ++i) wide[2 * i] = words[i] << 16, wide[2 * i + 1] = words[i] & 0xffff0000u;
    memcpy(out, wide, sizeof(wide));
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] = to_acc(pack.v[i]);
  }
}

// The channels of a head that a lane loads. Places count packs, so 32 bits reach 64 GiB, and one multiplication by a
// constant gives the address; value_places_fit says whether they suffice.
template <typename T, int W>
struct ValueRows {
  const char* base;
  __device__ __forceinline__ ValueRows(const DeformParams& p, int64_t b, int64_t m, int64_t c)
      : base(reinterpret_cast<const char*>(static_cast<const T*>(p.value) + b * p.value_batch + m * p.value_head + c)) {
  }
  __device__ __forceinline__ Pack<T, W> operator()(uint32_t place) const {
    return load_pack<W>(reinterpret_cast<const T*>(base + multiply_wide(place, W * sizeof(T))));
  }
  __device__ static __forceinline__ uint32_t pitch(const DeformParams& p) {
    return static_cast<uint32_t>(p.value_token / W);
  }
};

template <typename T>
bool value_packable(const DeformParams& p) {
  return packable<T>(p.value, p.value_batch) && packable<T>(p.value, p.value_token) &&
         packable<T>(p.value, p.value_head) && p.dim % kPack<T> == 0;
}

// Whether the places of an image's rows are 32-bit numbers.
template <typename T>
bool value_places_fit(const DeformParams& p) {
  const int64_t pitch = p.value_token / (value_packable<T>(p) ? kPack<T> : 1);
  return pitch <= UINT32_MAX && (p.tokens == 0 || pitch <= UINT32_MAX / p.tokens);
}

}  // namespace tokenprune

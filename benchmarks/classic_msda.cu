// SPDX-License-Identifier: Apache-2.0
// A stand-in for the classic multi-scale deformable attention op, for comparison only: one thread per output scalar,
// which reads every location and weight again; the backward has one block per (image, query, head), sums over channels
// in shared memory and adds the values' gradient with one atomic per corner and channel. Written for this benchmark
// from the definition; float32 only, as the op it stands for runs under autocast.
#include "../csrc/common/launch.h"

namespace tokenprune {
namespace {

struct Sizes {
  int64_t batch, tokens, heads, dim, queries, levels, points;
  __host__ __device__ int64_t outputs() const { return batch * queries * heads * dim; }
};

struct Corner {
  int64_t row[4];
  float weight[4];  // 0 outside
  float fx, fy;
  bool inside[4], any;
};

__device__ Corner corners_of(float x, float y, int height, int width) {
  Corner c;
  c.any = x > -1.f && y > -1.f && x < width && y < height;
  const int x0 = static_cast<int>(floorf(x)), y0 = static_cast<int>(floorf(y));
  c.fx = x - x0, c.fy = y - y0;
  const float wx[2] = {1.f - c.fx, c.fx}, wy[2] = {1.f - c.fy, c.fy};
  for (int i = 0; i < 4; ++i) {
    const int row = y0 + i / 2, column = x0 + i % 2;
    c.inside[i] = c.any && row >= 0 && column >= 0 && row < height && column < width;
    c.row[i] = static_cast<int64_t>(row) * width + column;
    c.weight[i] = c.inside[i] ? wy[i / 2] * wx[i % 2] : 0.f;
  }
  return c;
}

__global__ void classic_forward(Sizes s, const float* value, const int64_t* shapes, const int64_t* starts,
                                const float* locations, const float* weights, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= s.outputs()) return;
  const int64_t channel = i % s.dim, pair = i / s.dim, head = pair % s.heads, image = pair / s.heads / s.queries;
  const float* base = value + (image * s.tokens * s.heads + head) * s.dim + channel;
  float sum = 0.f;
  for (int64_t l = 0; l < s.levels; ++l) {
    const int height = static_cast<int>(shapes[2 * l]), width = static_cast<int>(shapes[2 * l + 1]);
    for (int64_t p = 0; p < s.points; ++p) {
      const int64_t at = (pair * s.levels + l) * s.points + p;
      const Corner c =
          corners_of(locations[2 * at] * width - 0.5f, locations[2 * at + 1] * height - 0.5f, height, width);
      if (!c.any) continue;
      float sample = 0.f;
      for (int k = 0; k < 4; ++k) {
        if (c.inside[k]) sample += c.weight[k] * base[(starts[l] + c.row[k]) * s.heads * s.dim];
      }
      sum += weights[at] * sample;
    }
  }
  out[i] = sum;
}

// One block of at least `dim` threads (a power of two) per (image, query, head).
__global__ void classic_backward(Sizes s, const float* value, const int64_t* shapes, const int64_t* starts,
                                 const float* locations, const float* weights, const float* grad, float* grad_value,
                                 float* grad_locations, float* grad_weights) {
  extern __shared__ float shared[];
  const int64_t pair = blockIdx.x, head = pair % s.heads, image = pair / s.heads / s.queries;
  const int64_t offset = (image * s.tokens * s.heads + head) * s.dim + threadIdx.x;
  const bool active = threadIdx.x < s.dim;
  const float g = active ? grad[pair * s.dim + threadIdx.x] : 0.f;
  for (int64_t l = 0; l < s.levels; ++l) {
    const int height = static_cast<int>(shapes[2 * l]), width = static_cast<int>(shapes[2 * l + 1]);
    for (int64_t p = 0; p < s.points; ++p) {
      const int64_t at = (pair * s.levels + l) * s.points + p;
      const Corner c =
          corners_of(locations[2 * at] * width - 0.5f, locations[2 * at + 1] * height - 0.5f, height, width);
      float v[4] = {};
      for (int k = 0; k < 4; ++k) {
        if (!c.inside[k] || !active) continue;
        const int64_t where = offset + (starts[l] + c.row[k]) * s.heads * s.dim;
        v[k] = value[where];
        atomicAdd(grad_value + where, weights[at] * c.weight[k] * g);
      }
      const float terms[3] = {
          c.any ? g * (c.weight[0] * v[0] + c.weight[1] * v[1] + c.weight[2] * v[2] + c.weight[3] * v[3]) : 0.f,
          c.any ? g * weights[at] * width * ((1.f - c.fy) * (v[1] - v[0]) + c.fy * (v[3] - v[2])) : 0.f,
          c.any ? g * weights[at] * height * ((1.f - c.fx) * (v[2] - v[0]) + c.fx * (v[3] - v[1])) : 0.f};
      for (int t = 0; t < 3; ++t) shared[t * blockDim.x + threadIdx.x] = terms[t];
      __syncthreads();
      for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
          for (int t = 0; t < 3; ++t) {
            shared[t * blockDim.x + threadIdx.x] += shared[t * blockDim.x + threadIdx.x + half];
          }
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) {
        grad_weights[at] = shared[0];
        grad_locations[2 * at] = shared[blockDim.x], grad_locations[2 * at + 1] = shared[2 * blockDim.x];
      }
      __syncthreads();
    }
  }
}

Sizes sizes_of(const Tensor& value, const Tensor& locations) {
  const char* op = "classic_msda";
  check_dim(op, "value", value, 4, "[B, S, M, D]");
  check_dtype(op, "value", value, ScalarType::Float);
  check_dim(op, "locations", locations, 6, "[B, Q, M, L, P, 2]");
  TP_CHECK(value.size(3) <= 1024, op, "value must have at most 1024 channels, got ", value.size(3));
  return {value.size(0),     value.size(1),     value.size(2),    value.size(3),
          locations.size(1), locations.size(3), locations.size(4)};
}

Tensor forward(const Tensor& value, const Tensor& shapes, const Tensor& starts, const Tensor& locations,
               const Tensor& weights) {
  const Sizes s = sizes_of(value, locations);
  Tensor out = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.dim});
  const Launcher launch(value);
  constexpr int kThreads = 1024;
  launch(&classic_forward, dim3(static_cast<unsigned>((s.outputs() + kThreads - 1) / kThreads)), dim3(kThreads), 0, s,
         data<float>(value), data<int64_t>(shapes), data<int64_t>(starts), data<float>(locations), data<float>(weights),
         mutable_data<float>(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& value, const Tensor& shapes, const Tensor& starts,
                                            const Tensor& locations, const Tensor& weights, const Tensor& grad) {
  const Sizes s = sizes_of(value, locations);
  Tensor grad_value = torch::stable::new_zeros(value, {s.batch, s.tokens, s.heads, s.dim});
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  const Launcher launch(value);
  unsigned threads = 32;
  while (threads < s.dim) threads *= 2;
  launch(&classic_backward, dim3(static_cast<unsigned>(s.batch * s.queries * s.heads)), dim3(threads),
         3 * threads * sizeof(float), s, data<float>(value), data<int64_t>(shapes), data<int64_t>(starts),
         data<float>(locations), data<float>(weights), data<float>(grad), mutable_data<float>(grad_value),
         mutable_data<float>(grad_locations), mutable_data<float>(grad_weights));
  return {grad_value, grad_locations, grad_weights};
}

STABLE_TORCH_LIBRARY(classic_msda, m) {
  m.def("forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "backward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights, Tensor grad) -> "
      "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(classic_msda, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace tokenprune

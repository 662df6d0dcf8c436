// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, and the order of the phases of each image.
#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

const ClusterKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? cluster_kernels_generic : cluster_kernels(); }

// f(item) for the items of one phase: by one thread when the images are spread over the threads, else by all.
template <typename F>
void for_items(bool alone, int64_t items, int64_t work_per_item, const F& f) {
  if (alone) {
    for (int64_t i = 0; i < items; ++i) f(i);
  } else {
    parallel_items(items, work_per_item, f);
  }
}

// f(image, alone): whole images per thread when there are enough of them, otherwise one after the other.
template <typename F>
void for_images(int64_t batch, int64_t work_per_image, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads > 1 && batch >= threads && (batch % threads == 0 || batch >= 4 * threads)) {
    parallel_items(batch, work_per_image, [&](int64_t image) { f(image, true); });
  } else {
    for (int64_t image = 0; image < batch; ++image) f(image, threads == 1);
  }
}

void cluster_image(const ClusterKernels& table, Dtype dtype, const ClusterParams& p, int64_t image, bool alone) {
  char* workspace = thread_scratch<1>(table.cluster_workspace(dtype, p));
  const int64_t scratch = table.cluster_scratch(dtype, p), values = p.tokens * p.channels;
  const auto run = [&](ClusterPhase phase, int64_t total_work, bool last = false) {
    const int64_t items = table.cluster_items(dtype, p, phase, workspace);
    for_items(alone, items, total_work / (items > 0 ? items : 1), [&](int64_t item) {
      ClusterStep s;
      s.image = image, s.phase = phase, s.item = item, s.last = last;
      s.workspace = workspace, s.scratch = thread_scratch(scratch);
      table.cluster_step(dtype, p, s);
    });
  };
  run(kSetup, 0);
  run(kPool, values / 4);
  for (int64_t i = 0; i < p.iters; ++i) {
    run(kPrepare, p.clusters * p.channels / 2);
    run(kScore, values * p.slots / 16, i == p.iters - 1);
    run(kGather, values * p.slots / 16);
  }
  run(kOutput, p.clusters * p.channels / 2);
}

std::tuple<Tensor, Tensor, Tensor> cluster_tokens(const Tensor& x, int64_t height, int64_t width, int64_t rows,
                                                  int64_t cols, int64_t iters, double temperature, int64_t window,
                                                  bool want_affinity) {
  const char* op = "cluster_tokens";
  ClusterCall call(op, x, height, width, rows, cols, iters, temperature, window);
  ClusterParams& p = call.p;
  Tensor centers = call.new_centers(), mass = call.new_mass(), affinity = call.new_affinity(want_affinity);
  p.centers = centers.mutable_data_ptr(), p.mass = mass.mutable_data_ptr();
  if (want_affinity) p.affinity = affinity.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const ClusterKernels& table = kernels(dtype);
  for_images(p.batch, p.tokens * p.channels * (p.iters + 1),
             [&](int64_t image, bool alone) { cluster_image(table, dtype, p, image, alone); });
  return {centers, mass, affinity};
}

Tensor cluster_tokens_backward(const Tensor& grad, const Tensor& mass, const Tensor& affinity, int64_t height,
                               int64_t width, int64_t rows, int64_t cols, int64_t iters, int64_t window) {
  const char* op = "cluster_tokens_backward";
  ClusterBackwardCall call(op, grad, mass, affinity, height, width, rows, cols, iters, window);
  ClusterBackwardParams& p = call.p;
  Tensor grad_x = call.new_grad_x();
  p.grad_x = grad_x.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, grad.scalar_type());
  const ClusterKernels& table = kernels(dtype);
  if (grad_x.numel() == 0) return grad_x;
  parallel_ranges(p.batch * height, width * p.channels * p.slots / 8,
                  [&](int64_t begin, int64_t end) { table.cluster_backward(dtype, p, begin, end); });
  return grad_x;
}

// Packs the centers of every image, then f(step, alone) with the image's memory.
template <typename F>
void for_packed_images(const ClusterKernels& table, Dtype dtype, const ReconstructParams& p, const F& f) {
  const int64_t shared = table.reconstruct_shared(dtype, p), scratch = table.reconstruct_scratch(dtype, p);
  const int64_t panels = table.reconstruct_panels(dtype, p);
  for_images(p.batch, p.tokens * p.clusters * p.channels / 16, [&](int64_t image, bool alone) {
    ReconstructStep s;
    s.image = image, s.shared = thread_scratch<1>(shared);
    const auto run = [&](auto kernel, int64_t first, int64_t items, int64_t total_work) {
      for_items(alone, items, total_work / (items > 0 ? items : 1), [&](int64_t item) {
        ReconstructStep own = s;
        own.item = first + item, own.scratch = thread_scratch(scratch);
        kernel(dtype, p, own);
      });
    };
    run(table.reconstruct_pack, -1, 1, 0);
    run(table.reconstruct_pack, 0, panels, p.clusters * p.channels / 4);
    f(run);
  });
}

int64_t strip_work(const ReconstructParams& p) { return p.tokens * p.clusters * (p.channels / 16 + 4); }

Tensor nearest_centers(const Tensor& features, const Tensor& centers) {
  const char* op = "nearest_centers";
  ReconstructCall call(op, features, centers);
  ReconstructParams& p = call.p;
  Tensor nearest = call.new_nearest();
  p.nearest = mutable_data<int64_t>(nearest);
  const Dtype dtype = kernel_dtype(op, features.scalar_type());
  const ClusterKernels& table = kernels(dtype);
  if (nearest.numel() == 0) return nearest;
  for_packed_images(table, dtype, p, [&](auto&& run) {
    run(table.nearest_strip, 0, table.reconstruct_strips(dtype, p), strip_work(p));
  });
  return nearest;
}

Tensor reconstruct_tokens(const Tensor& features, const Tensor& centers, const Tensor& values, int64_t k,
                          double temperature, bool l1) {
  const char* op = "reconstruct_tokens";
  ReconstructCall call(op, features, centers);
  call.set_values(op, values, k, temperature, l1);
  ReconstructParams& p = call.p;
  Tensor out = call.new_out();
  p.out = out.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, features.scalar_type());
  const ClusterKernels& table = kernels(dtype);
  if (out.numel() == 0) return out;
  for_packed_images(table, dtype, p, [&](auto&& run) {
    run(table.reconstruct_strip, 0, table.reconstruct_strips(dtype, p), strip_work(p));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_tokens_backward(const Tensor& grad, const Tensor& features,
                                                               const Tensor& centers, const Tensor& values, int64_t k,
                                                               double temperature, bool l1) {
  const char* op = "reconstruct_tokens_backward";
  ReconstructCall call(op, features, centers);
  call.set_values(op, values, k, temperature, l1);
  call.set_grad(op, grad);
  ReconstructParams& p = call.p;
  Tensor grad_features = call.new_grad_features(), grad_centers = call.new_grad_centers(),
         grad_values = call.new_grad_values();
  p.grad_features = grad_features.mutable_data_ptr(), p.grad_centers = grad_centers.mutable_data_ptr();
  p.grad_values = grad_values.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, features.scalar_type());
  const ClusterKernels& table = kernels(dtype);
  for_packed_images(table, dtype, p, [&](auto&& run) {
    const int64_t sums = p.tokens * p.k * (p.channels + p.width) / 8;
    run(table.reconstruct_backward_strip, 0, table.reconstruct_strips(dtype, p), strip_work(p) + sums);
    run(table.reconstruct_lists, 0, 1, 0);
    run(table.reconstruct_backward_center, 0, p.clusters, sums);
  });
  return {grad_features, grad_centers, grad_values};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("cluster_tokens", TORCH_BOX(&cluster_tokens));
  m.impl("cluster_tokens_backward", TORCH_BOX(&cluster_tokens_backward));
  m.impl("nearest_centers", TORCH_BOX(&nearest_centers));
  m.impl("reconstruct_tokens", TORCH_BOX(&reconstruct_tokens));
  m.impl("reconstruct_tokens_backward", TORCH_BOX(&reconstruct_tokens_backward));
}

}  // namespace
}  // namespace tokenprune

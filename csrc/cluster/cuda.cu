// SPDX-License-Identifier: Apache-2.0
// CUDA side of clustering. Reconstruction is in cuda_reconstruct.cu: they compile side by side.
#include "../common/launch.h"
#include "checks.h"
#include "kernel.cuh"

namespace tokenprune {
namespace {

std::tuple<Tensor, Tensor, Tensor> cluster_tokens(const Tensor& x, int64_t height, int64_t width, int64_t rows,
                                                  int64_t cols, int64_t iters, double temperature, int64_t window,
                                                  bool affinity) {
  const char* op = "cluster_tokens";
  ClusterCall call(op, x, height, width, rows, cols, iters, temperature, window);
  ClusterParams& p = call.p;
  const Launcher launch(x);
  Tensor centers = call.new_centers(), mass = call.new_mass(), wanted = call.new_affinity(affinity);
  p.centers = centers.mutable_data_ptr(), p.mass = mass.mutable_data_ptr();
  if (affinity && iters > 0) p.affinity = wanted.mutable_data_ptr();
  visit_floating_cuda(op, x.scalar_type(), [&]<typename T>() {
    using A = Acc<T>;
    const cluster::ClusterPlan plan = cluster::plan_of(p);
    const auto space_for = [&](int64_t elements) {
      return torch::stable::new_empty(call.x, {elements}, stat_dtype(x.scalar_type()));
    };
    Tensor first = space_for(p.affinity == nullptr ? plan.distances : 0);
    Tensor second = space_for(plan.banded && iters > 1 ? plan.distances : 0);
    Tensor pairs = space_for(plan.pairs), refined = space_for(plan.centers);
    cluster::ClusterSpace<A> space;
    space.affinity = p.affinity != nullptr ? static_cast<A*>(p.affinity) : mutable_data<A>(first);
    space.distances = mutable_data<A>(second), space.pairs = mutable_data<A>(pairs);
    space.centers = mutable_data<A>(refined);
    cluster::launch_cluster<T>(launch, p, plan, space);
  });
  return {centers, mass, wanted};
}

Tensor cluster_tokens_backward(const Tensor& grad, const Tensor& mass, const Tensor& affinity, int64_t height,
                               int64_t width, int64_t rows, int64_t cols, int64_t iters, int64_t window) {
  const char* op = "cluster_tokens_backward";
  ClusterBackwardCall call(op, grad, mass, affinity, height, width, rows, cols, iters, window);
  const Launcher launch(grad);
  Tensor grad_x = call.new_grad_x();
  call.p.grad_x = grad_x.mutable_data_ptr();
  visit_floating_cuda(op, grad.scalar_type(),
                      [&]<typename T>() { cluster::launch_cluster_backward<T>(launch, call.p); });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("cluster_tokens", TORCH_BOX(&cluster_tokens));
  m.impl("cluster_tokens_backward", TORCH_BOX(&cluster_tokens_backward));
}

}  // namespace
}  // namespace tokenprune

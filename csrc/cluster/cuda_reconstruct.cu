// SPDX-License-Identifier: Apache-2.0
// CUDA side of reconstruction and of the nearest centers.
#include "../common/launch.h"
#include "checks.h"
#include "kernel_reconstruct.cuh"

namespace tokenprune {
namespace {

// A matrix of weights for as many images as are taken at once.
Tensor new_weights(const ReconstructCall& call) {
  const ReconstructParams& p = call.p;
  return torch::stable::new_empty(call.features, {cluster::images_at_once(p), p.tokens, p.clusters},
                                  stat_dtype(call.features.scalar_type()));
}

Tensor nearest_centers(const Tensor& features, const Tensor& centers) {
  const char* op = "nearest_centers";
  ReconstructCall call(op, features, centers);
  const Launcher launch(features);
  Tensor nearest = call.new_nearest();
  call.p.nearest = mutable_data<int64_t>(nearest);
  visit_floating_cuda(op, features.scalar_type(), [&]<typename T>() { cluster::launch_nearest<T>(launch, call.p); });
  return nearest;
}

Tensor reconstruct_tokens(const Tensor& features, const Tensor& centers, const Tensor& values, int64_t k,
                          double temperature, bool l1) {
  const char* op = "reconstruct_tokens";
  ReconstructCall call(op, features, centers);
  call.set_values(op, values, k, temperature, l1);
  const Launcher launch(features);
  Tensor out = call.new_out(), weights = new_weights(call);
  call.p.out = out.mutable_data_ptr();
  visit_floating_cuda(op, features.scalar_type(), [&]<typename T>() {
    cluster::launch_reconstruct<T>(launch, call.p, mutable_data<Acc<T>>(weights));
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
  const Launcher launch(features);
  Tensor grad_features = call.new_grad_features(), grad_centers = call.new_grad_centers(),
         grad_values = call.new_grad_values(), weights = new_weights(call), slopes = new_weights(call);
  call.p.grad_features = grad_features.mutable_data_ptr(), call.p.grad_centers = grad_centers.mutable_data_ptr();
  call.p.grad_values = grad_values.mutable_data_ptr();
  visit_floating_cuda(op, features.scalar_type(), [&]<typename T>() {
    using A = Acc<T>;
    cluster::launch_reconstruct_backward<T>(launch, call.p, mutable_data<A>(weights), mutable_data<A>(slopes));
  });
  return {grad_features, grad_centers, grad_values};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("nearest_centers", TORCH_BOX(&nearest_centers));
  m.impl("reconstruct_tokens", TORCH_BOX(&reconstruct_tokens));
  m.impl("reconstruct_tokens_backward", TORCH_BOX(&reconstruct_tokens_backward));
}

}  // namespace
}  // namespace tokenprune

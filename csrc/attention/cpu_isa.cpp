// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_kernels.h"
#include "cpu_policy.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

bool forward(Dtype dtype, const AttentionParams& p, int64_t item, int64_t chunks, char* scratch) {
  return visit(dtype, [&]<typename T>() { forward_item<T>(p, item, chunks, scratch); });
}
bool scores(Dtype dtype, const AttentionParams& p, int64_t item, char* scratch) {
  return visit(dtype, [&]<typename T>() { scores_item<T>(p, item, scratch); });
}
bool backward(Dtype dtype, const AttentionParams& p, int64_t item, char* scratch) {
  return visit(dtype, [&]<typename T>() { backward_item<T>(p, item, scratch); });
}
bool policy_forward(Dtype dtype, const PolicyParams& p, int64_t item, char* scratch) {
  return visit(dtype, [&]<typename T>() { policy_forward_item<T>(p, item, scratch); });
}
bool policy_backward(Dtype dtype, const PolicyParams& p, int64_t item, char* scratch) {
  return visit(dtype, [&]<typename T>() { policy_backward_item<T>(p, item, scratch); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const AttentionKernels TP_TABLE(attention_kernels) = {
    forward_scratch_bytes, forward,        scores,          backward_scratch_bytes, backward,
    policy_scratch_bytes,  policy_forward, policy_backward,
};

}  // namespace tokenprune

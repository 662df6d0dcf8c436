// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_cluster.h"
#include "cpu_kernels.h"
#include "cpu_reconstruct_backward.h"
#include "cpu_score.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

int64_t cluster_workspace(Dtype d, const ClusterParams& p) {
  int64_t bytes = 0;
  visit(d, [&]<typename T>() { bytes = ClusterSpace<T>(p, nullptr).bytes; });
  return bytes;
}

int64_t cluster_scratch(Dtype d, const ClusterParams& p) {
  int64_t bytes = 0;
  visit(d, [&]<typename T>() { bytes = ScoreSpace<T>(p, nullptr).bytes; });
  return bytes;
}

template <typename T>
int64_t cluster_items_of(const ClusterParams& p, ClusterPhase phase, const char* workspace) {
  const ClusterSpace<T> space(p, const_cast<char*>(workspace));
  return phase == kSetup ? 1 : phase == kScore ? space.y_groups[0] : phase == kGather ? space.chunks() : p.y_axis.cells;
}
int64_t cluster_items(Dtype d, const ClusterParams& p, ClusterPhase phase, const char* workspace) {
  int64_t items = 0;
  visit(d, [&]<typename T>() { items = cluster_items_of<T>(p, phase, workspace); });
  return items;
}

template <typename T>
void cluster_step_of(const ClusterParams& p, const ClusterStep& s) {
  switch (s.phase) {
    case kSetup: return cluster_setup<T>(p, s);
    case kPool: return cluster_pool<T>(p, s);
    case kPrepare: return cluster_prepare<T>(p, s);
    case kScore: return cluster_score<T>(p, s);
    case kGather: return cluster_gather<T>(p, s);
    case kOutput: return cluster_output<T>(p, s);
  }
}

bool cluster_step(Dtype d, const ClusterParams& p, const ClusterStep& s) {
  return visit(d, [&]<typename T>() { cluster_step_of<T>(p, s); });
}
bool cluster_backward(Dtype d, const ClusterBackwardParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() {
    for (int64_t row = begin; row < end; ++row) cluster_backward_row<T>(p, row);
  });
}

int64_t reconstruct_shared(Dtype d, const ReconstructParams& p) {
  int64_t bytes = 0;
  visit(d, [&]<typename T>() { bytes = ReconstructSpace<T>(p, nullptr, nullptr).shared_bytes; });
  return bytes;
}
int64_t reconstruct_scratch(Dtype d, const ReconstructParams& p) {
  int64_t bytes = 0;
  visit(d, [&]<typename T>() { bytes = ReconstructSpace<T>(p, nullptr, nullptr).scratch_bytes; });
  return bytes;
}
int64_t reconstruct_panels(Dtype d, const ReconstructParams& p) {
  int64_t panels = 0;
  visit(d, [&]<typename T>() { panels = ceil_div(p.clusters, ReconstructSpace<T>::kPanel); });
  return panels;
}
int64_t reconstruct_strips(Dtype, const ReconstructParams& p) { return ceil_div(p.tokens, kStripTokens); }

bool reconstruct_pack(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { reconstruct_pack_item<T>(p, s); });
}
bool nearest_strip(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { nearest_strip_item<T>(p, s); });
}
bool reconstruct_strip(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { reconstruct_strip_item<T>(p, s); });
}
bool reconstruct_backward_strip(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { reconstruct_backward_strip_item<T>(p, s); });
}
bool reconstruct_lists(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { reconstruct_lists_item<T>(p, s); });
}
bool reconstruct_backward_center(Dtype d, const ReconstructParams& p, const ReconstructStep& s) {
  return visit(d, [&]<typename T>() { reconstruct_backward_center_item<T>(p, s); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const ClusterKernels TP_TABLE(cluster_kernels) = {
    cluster_workspace,
    cluster_scratch,
    cluster_items,
    cluster_step,
    cluster_backward,
    reconstruct_shared,
    reconstruct_scratch,
    reconstruct_panels,
    reconstruct_strips,
    reconstruct_pack,
    nearest_strip,
    reconstruct_strip,
    reconstruct_backward_strip,
    reconstruct_lists,
    reconstruct_backward_center,
};

}  // namespace tokenprune

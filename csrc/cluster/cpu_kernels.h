// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

// Clustering of one image is a sequence of phases; the items of a phase are independent of each other.
//   setup, pool               once; then for every iteration
//   prepare, score, gather    relative centers and their norms; affinities; weighted sums of tokens
//   output                    once
enum ClusterPhase : int { kSetup, kPool, kPrepare, kScore, kGather, kOutput };

struct ClusterStep {
  int64_t image = 0;
  ClusterPhase phase = kSetup;
  int64_t item = 0;
  bool last = false;          // last iteration: the affinities are wanted
  char* workspace = nullptr;  // of this image
  char* scratch = nullptr;    // of this thread
};

struct ReconstructStep {
  int64_t image = 0, item = 0;
  char* shared = nullptr;   // of this image
  char* scratch = nullptr;  // of this thread
};

struct ClusterKernels {
  int64_t (*cluster_workspace)(Dtype, const ClusterParams&);
  int64_t (*cluster_scratch)(Dtype, const ClusterParams&);
  int64_t (*cluster_items)(Dtype, const ClusterParams&, ClusterPhase, const char* workspace);  // after setup
  bool (*cluster_step)(Dtype, const ClusterParams&, const ClusterStep&);
  // Rows of the map [begin, end), counted over all images.
  bool (*cluster_backward)(Dtype, const ClusterBackwardParams&, int64_t begin, int64_t end);

  // Reconstruction: pack the centers (and values) of an image, then strips of tokens, then (backward) centers.
  int64_t (*reconstruct_shared)(Dtype, const ReconstructParams&);
  int64_t (*reconstruct_scratch)(Dtype, const ReconstructParams&);
  int64_t (*reconstruct_panels)(Dtype, const ReconstructParams&);
  int64_t (*reconstruct_strips)(Dtype, const ReconstructParams&);
  bool (*reconstruct_pack)(Dtype, const ReconstructParams&, const ReconstructStep&);
  bool (*nearest_strip)(Dtype, const ReconstructParams&, const ReconstructStep&);
  bool (*reconstruct_strip)(Dtype, const ReconstructParams&, const ReconstructStep&);
  bool (*reconstruct_backward_strip)(Dtype, const ReconstructParams&, const ReconstructStep&);
  bool (*reconstruct_lists)(Dtype, const ReconstructParams&, const ReconstructStep&);
  bool (*reconstruct_backward_center)(Dtype, const ReconstructParams&, const ReconstructStep&);
};

TP_DECLARE_TABLES(ClusterKernels, cluster_kernels)

}  // namespace tokenprune

// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp. One call = one item of work; items are independent.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct AttentionKernels {
  // (sequence, head, chunk of query strips); item = (sequence * heads + head) * chunks + chunk.
  int64_t (*forward_scratch)(const AttentionParams&);
  bool (*forward)(Dtype, const AttentionParams&, int64_t item, int64_t chunks, char* scratch);
  // (sequence, head): column scores, or their gradient with respect to lse.
  bool (*scores)(Dtype, const AttentionParams&, int64_t item, char* scratch);
  // (sequence, head): all gradients.
  int64_t (*backward_scratch)(const AttentionParams&);
  bool (*backward)(Dtype, const AttentionParams&, int64_t item, char* scratch);
  // (image, head)
  int64_t (*policy_scratch)(const PolicyParams&);
  bool (*policy_forward)(Dtype, const PolicyParams&, int64_t item, char* scratch);
  bool (*policy_backward)(Dtype, const PolicyParams&, int64_t item, char* scratch);
};

TP_DECLARE_TABLES(AttentionKernels, attention_kernels)

}  // namespace tokenprune

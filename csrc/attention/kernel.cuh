// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the attention ops, one file per direction.
#pragma once

#include "kernel_backward.cuh"
#include "kernel_forward.cuh"
#include "kernel_policy_backward.cuh"

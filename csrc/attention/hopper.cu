// SPDX-License-Identifier: Apache-2.0
// The sm_90a forward of sparse_attention (wgmma, tensor copy engine).
#include "../common/hopper.h"
#include "hopper.h"
#include "kernel_hopper_launch.cuh"

namespace tokenprune {

bool hopper_attention(const Launcher& launch, const AttentionParams& p, ScalarType dtype, int device, int processors) {
  const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (!half || !attention::hopper_serves(p) || !hopper_enabled(device)) return false;
  const auto encode = [&](const Rows& rows, int64_t heads, int64_t dim, int box_columns, int box_rows) {
    const int64_t head_stride = heads == 1 ? rows.row_stride : rows.head_stride;  // of one head it is not used
    return tensor_map(dtype, rows.data, {dim, heads, rows.rows}, {head_stride * 2, rows.row_stride * 2}, box_columns,
                      box_rows);
  };
  if (dtype == ScalarType::Half) {
    attention::launch_hopper<__half>(launch, encode, p, processors);
  } else {
    attention::launch_hopper<__nv_bfloat16>(launch, encode, p, processors);
  }
  return true;
}

}  // namespace tokenprune

// SPDX-License-Identifier: Apache-2.0
// Host side of the sm_90a units: whether they are switched on, and tensor maps for the copy engine.
#pragma once

#include <cuda.h>

#include <cstdlib>
#include <cstring>

#include "launch.h"

namespace tokenprune {

// TOKENPRUNE_HOPPER=1 on a device of capability 9.0. Off by default: no GPU has yet shown these units right and faster.
inline bool hopper_enabled(int device) {
  static const bool wanted = [] {
    const char* text = std::getenv("TOKENPRUNE_HOPPER");
    if (text == nullptr || *text == '\0' || std::strcmp(text, "0") == 0) return false;
    STD_TORCH_CHECK(std::strcmp(text, "1") == 0, "tokenprune: TOKENPRUNE_HOPPER must be 0 or 1, got '", text, "'");
    return true;
  }();
  if (!wanted) return false;
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

// The driver's encoder. It is asked for at run time, so that the library loads where there is no driver.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
inline EncodeTiled tensor_map_encoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
                    "tokenprune: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encoder;
}

// Map of 16-bit values [planes of dimension 2][dimension 1][contiguous dimension 0] with boxes of box_rows x 1 x
// box_columns; columns of 64 land swizzled by 128 bytes, columns of 16 by 32. Strides in bytes, multiples of 16. Boxes
// that hang over an end read zeros there.
inline CUtensorMap tensor_map(ScalarType dtype, const void* data, const int64_t (&dims)[3], const int64_t (&strides)[2],
                              int box_columns, int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(dims[0]), static_cast<cuuint64_t>(dims[1]),
                               static_cast<cuuint64_t>(dims[2])};
  const cuuint64_t steps[2] = {static_cast<cuuint64_t>(strides[0]), static_cast<cuuint64_t>(strides[1])};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, dtype == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(data), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "tokenprune: cuTensorMapEncodeTiled failed with code ",
                  static_cast<int>(status), " for ", dims[2], " x ", dims[1], " x ", dims[0], " values with strides ",
                  strides[1], " and ", strides[0], " bytes");
  return map;
}

}  // namespace tokenprune

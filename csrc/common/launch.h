// SPDX-License-Identifier: Apache-2.0
// Launching from a stable-ABI operator: the tensor's device, torch's current stream, an error check after each launch.
//
//   const Launcher launch(x);                              // device guard for its lifetime
//   launch(&kernel<float>, grid, block, shared_bytes, args...);
//
// The host model has a class of the same shape (tests/csrc/host_model.h), so the functions of a kernel.cuh that issue a
// sequence of launches take the launcher as a template argument and are tested without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "check.h"
#include "cuda.h"

namespace tokenprune {

class Launcher {
 public:
  explicit Launcher(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Args>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) const {
    if (shared_bytes > 48 * 1024) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    kernel<<<grid, block, shared_bytes, stream_>>>(static_cast<Parameters>(args)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Shared memory that a block of this device may ask for.
  int64_t most_shared_bytes() const {
    int device = 0, bytes = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }

  // One number from the device. This is the only thing here that waits for the stream.
  template <typename T>
  T read(const T* device_value) const {
    T value{};
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, device_value, sizeof(T), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return value;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The C++ type of a floating dtype as kernels name it; f.template operator()<T>().
template <typename F>
void visit_floating_cuda(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Double: return f.template operator()<double>();
    case ScalarType::Half: return f.template operator()<__half>();
    case ScalarType::BFloat16: return f.template operator()<__nv_bfloat16>();
    default: TP_CHECK(false, op, "dtype must be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
  }
}

}  // namespace tokenprune

// SPDX-License-Identifier: Apache-2.0
// The Python module _C: what was built and what this CPU has. The kernels are reached through torch.ops, not from here.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <string>

namespace {

// The CPU library is loaded by torch.ops.load_library with local scope; ask that very object.
std::string cpu_capability(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return "not loaded";
  const auto ask = reinterpret_cast<const char* (*)()>(dlsym(handle, "tokenprune_cpu_capability"));
  const std::string answer = ask == nullptr ? "unknown" : ask();
  dlclose(handle);
  return answer;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of tokenprune_ext.";
  m.def("cpu_capability", &cpu_capability, pybind11::arg("library"),
        "Instruction set in use: generic, avx2, avx512 or avx512_bf16.");
  m.def("cuda_archs", [] { return std::string(TOKENPRUNE_ARCHS); }, "Architectures the CUDA library was built for.");
}

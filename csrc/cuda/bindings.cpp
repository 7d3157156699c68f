// The CUDA extension module. Importing it registers the operators (ops.cpp); what it exports to Python
// is about the build.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of pc_kernels; their operators are in torch.ops.pc_kernels.";
  module.attr("cuda_version") = CUDART_VERSION;
  module.attr("architectures") = PCK_CUDA_ARCHITECTURES;
}

// The extension module. Importing it registers the operators (cpu/ops.cpp); what it exports to Python
// is about the build.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include "cpu/rows.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of pc_kernels; their operators are in torch.ops.pc_kernels.";
  module.def(
      "cpu_isa", [] { return pck::row_kernels().name; },
      "The instruction set of the CPU kernels in use.");
  module.def(
      "threads", [] { return at::get_num_threads(); },
      "Threads that the CPU kernels share with PyTorch.");
  module.def("compiler", [] { return __VERSION__; }, "The compiler that built this module.");
  module.def(
      "stencil",
      [] {
        py::list rows;
        for (const auto& row : pck::kStencil.weight) {
          py::list weights;
          for (const float weight : row) weights.append(weight);
          rows.append(weights);
        }
        return rows;
      },
      "The stencil of the grid method, [terms][nodes]: see csrc/formulas.h.");
}

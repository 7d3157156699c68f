// The extension module. Importing it registers the operators (cpu/ops.cpp); what it exports to Python
// is about the build, and the tables of formulas for the tests.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

// f at every x.
template <class T, class F>
std::vector<T> at_all(const std::vector<T>& points, F f) {
  std::vector<T> values;
  for (const T x : points) values.push_back(f(x));
  return values;
}

py::list relaxations(const std::vector<double>& points) {
  py::list rows;
  pck::for_each(pck::Relaxations{}, [&](auto row) {
    using R = decltype(row);
    rows.append(py::dict(py::arg("name") = +R::name, py::arg("code") = +R::code,
                         py::arg("inverse_step") = +R::inverse_step, py::arg("support") = +R::support,
                         py::arg("reach") = +R::reach,
                         py::arg("integral") = at_all(points, [](double x) { return R::integral(x); }),
                         py::arg("cdf") = at_all(points, [](double x) { return R::cdf(x); }),
                         py::arg("pdf") = at_all(points, [](double x) { return R::pdf(x); })));
  });
  return rows;
}

py::list penalties(const std::vector<float>& points) {
  py::list rows;
  pck::for_each(pck::Penalties{}, [&](auto row) {
    using P = decltype(row);
    rows.append(py::dict(py::arg("name") = +P::name, py::arg("code") = +P::code,
                         py::arg("value") = at_all(points, [](float e) { return P::value(e); }),
                         py::arg("slope") = at_all(points, [](float e) { return P::slope(e); })));
  });
  return rows;
}

std::vector<std::vector<float>> stencil() {
  std::vector<std::vector<float>> rows;
  for (const auto& row : pck::kStencil.weight) rows.emplace_back(std::begin(row), std::end(row));
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of pc_kernels; their operators are in torch.ops.pc_kernels.";
  module.def(
      "cpu_isa", [] { return pck::row_kernels().name; },
      "The instruction set of the CPU kernels in use.");
  module.def(
      "threads", [] { return at::get_num_threads(); },
      "Threads that the CPU kernels share with PyTorch.");
  module.def("compiler", [] { return __VERSION__; }, "The compiler that built this module.");
  module.def("stencil", &stencil,
             "The stencil of the grid method, [terms][nodes]: see csrc/formulas.h.");
  module.def("relaxations", &relaxations,
             "The table of relaxations, with its functions at these points.");
  module.def("penalties", &penalties, "The table of penalties, with its functions at these residuals.");
}

// The tables and the stencil of csrc/formulas.h as Python sees them: see tables.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "formulas.h"

namespace py = pybind11;

namespace {

// f at every x.
template <class T, class F>
std::vector<T> at_all(const std::vector<T>& points, F f) {
  std::vector<T> values;
  for (const T x : points) values.push_back(f(x));
  return values;
}

// The size of a relaxation's grid, (inverse step, support, reach), or None.
template <class R>
py::object grid_of() {
  if constexpr (R::method == pck::Method::grid)
    return py::make_tuple(+R::inverse_step, +R::support, +R::reach);
  else
    return py::none();
}

py::list relaxations(const std::vector<double>& points) {
  py::list rows;
  pck::for_each(pck::SmoothSteps{}, [&](auto row) {
    using R = decltype(row);
    rows.append(py::dict(py::arg("name") = +R::name, py::arg("code") = +R::code,
                         py::arg("grid") = grid_of<R>(),
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

PYBIND11_MODULE(formula_tables, module) {
  module.def("stencil", &stencil, "The stencil of the grid method, [terms][nodes].");
  module.def("relaxations", &relaxations, py::arg("points"), "Relaxations, with their values there.");
  module.def("penalties", &penalties, py::arg("points"), "Penalties, with their values there.");
}

// The extension module, in Python's limited API. Importing it registers the operators (cpu/ops.cpp);
// what it exports to Python is about the build, and the tables of formulas for the tests.
#include <Python.h>

#include <exception>
#include <iterator>

#include "cpu/isa.h"

namespace {

// f(0), f(1) ... as a list.
template <class F>
PyObject* list_of(Py_ssize_t count, F f) {
  PyObject* const list = PyList_New(count);
  for (Py_ssize_t i = 0; list != nullptr && i < count; ++i) PyList_SetItem(list, i, f(i));
  return list;
}

// f at every x of a list of numbers. What is not one is an exception, which Py_BuildValue passes on.
template <class F>
PyObject* at_all(PyObject* points, F f) {
  if (!PyList_Check(points)) {
    PyErr_SetString(PyExc_TypeError, "the points must be a list of numbers");
    return nullptr;
  }
  PyObject* const values = list_of(PyList_Size(points), [&](Py_ssize_t i) {
    return PyFloat_FromDouble(f(PyFloat_AsDouble(PyList_GetItem(points, i))));
  });
  if (PyErr_Occurred() == nullptr) return values;
  Py_XDECREF(values);
  return nullptr;
}

// row_of(row) of every row of a table.
template <class Table, class RowOf>
PyObject* table_of(Table table, RowOf row_of) {
  PyObject* const rows = PyList_New(0);
  pck::for_each(table, [&](auto row) {
    PyObject* const made = rows == nullptr || PyErr_Occurred() ? nullptr : row_of(row);
    if (made != nullptr) PyList_Append(rows, made);
    Py_XDECREF(made);
  });
  if (PyErr_Occurred() == nullptr) return rows;
  Py_XDECREF(rows);
  return nullptr;
}

// The size of a relaxation's grid, (inverse step, support, reach), or None.
template <class R>
PyObject* grid_of() {
  if constexpr (R::method == pck::Method::grid)
    return Py_BuildValue("iii", R::inverse_step, R::support, R::reach);
  else
    return Py_BuildValue("");
}

PyObject* relaxations(PyObject*, PyObject* points) {
  return table_of(pck::SmoothSteps{}, [=](auto row) {
    using R = decltype(row);
    return Py_BuildValue("{s:s,s:i,s:N,s:N,s:N,s:N}", "name", R::name, "code", R::code, "grid",
                         grid_of<R>(), "integral",
                         at_all(points, [](double x) { return R::integral(x); }), "cdf",
                         at_all(points, [](double x) { return R::cdf(x); }), "pdf",
                         at_all(points, [](double x) { return R::pdf(x); }));
  });
}

PyObject* penalties(PyObject*, PyObject* points) {
  return table_of(pck::Penalties{}, [=](auto row) {
    using P = decltype(row);
    const auto value = [](double e) { return P::value(static_cast<float>(e)); };
    const auto slope = [](double e) { return P::slope(static_cast<float>(e)); };
    return Py_BuildValue("{s:s,s:i,s:N,s:N}", "name", P::name, "code", P::code, "value",
                         at_all(points, value), "slope", at_all(points, slope));
  });
}

PyObject* stencil(PyObject*, PyObject*) {
  return list_of(std::size(pck::kStencil.weight), [](Py_ssize_t term) {
    const auto& row = pck::kStencil.weight[term];
    return list_of(std::size(row), [&](Py_ssize_t node) { return PyFloat_FromDouble(row[node]); });
  });
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(pck::row_kernels().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* compiler(PyObject*, PyObject*) {
  return PyUnicode_FromString(__VERSION__);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built this module."},
    {"stencil", stencil, METH_NOARGS,
     "The stencil of the grid method, [terms][nodes]: see csrc/formulas.h."},
    {"relaxations", relaxations, METH_O,
     "The table of relaxations, with its functions at these points."},
    {"penalties", penalties, METH_O, "The table of penalties, with its functions at these residuals."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "pc_kernels._C",
    "Compiled kernels of pc_kernels; their operators are in torch.ops.pc_kernels.",
    0,
    methods,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&definition);
}

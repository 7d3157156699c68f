// The extension module, in Python's limited API. Importing it registers the operators (cpu/ops.cpp);
// what it exports to Python is about the build.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"

namespace {

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

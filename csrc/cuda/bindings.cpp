// The CUDA extension module, in Python's limited API. Importing it registers the operators (ops.cpp);
// what it exports to Python is about the build.
#include <Python.h>
#include <cuda_runtime_api.h>

namespace {

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "pc_kernels._C_cuda",
    "CUDA kernels of pc_kernels; their operators are in torch.ops.pc_kernels.",
};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* const module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "cuda_version", CUDART_VERSION) == 0 &&
      PyModule_AddStringConstant(module, "architectures", PCK_CUDA_ARCHITECTURES) == 0)
    return module;
  Py_XDECREF(module);
  return nullptr;
}

// The importable shell of the extension: importing it runs the registrations in bind_cpu.cpp, and a
// missing symbol is named by Python's import error.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Kernels of opentrans_kernels, registered with torch.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}

// The Python module geffect_fast._C: what the native build consists of. It includes no torch
// header; the kernels are in a library of their own (geffect_fast._kernels), which needs no Python.
// Written against Python's limited API, so that one build serves every later Python.
#undef Py_LIMITED_API  // torch's build names the oldest Python that torch itself serves
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <sstream>
#include <string>

namespace {

// Adds `value`, which it takes over, to `dict`; false after an error.
bool put(PyObject* dict, const char* key, PyObject* value) {
  const bool done = value != nullptr && PyDict_SetItemString(dict, key, value) == 0;
  Py_XDECREF(value);
  return done;
}

PyObject* split(const std::string& text) {
  PyObject* items = PyList_New(0);
  std::istringstream stream(text);
  for (std::string item; items != nullptr && std::getline(stream, item, ',');) {
    PyObject* name = PyUnicode_FromString(item.c_str());
    if (name == nullptr || PyList_Append(items, name) != 0) Py_CLEAR(items);
    Py_XDECREF(name);
  }
  return items;
}

PyObject* architectures() {
#if defined(__x86_64__)
  std::string names = "x86-64,x86-64+avx2+fma (chosen at run time)";
#elif defined(__aarch64__)
  std::string names = "aarch64";
#else
  std::string names = "generic";
#endif
  return split(names + "," GEFFECT_FAST_CUDA_ARCHITECTURES);
}

PyObject* cuda_version() {
  const std::string version = GEFFECT_FAST_CUDA_VERSION;
  if (version.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(version.c_str());
}

PyObject* ops() {
  PyObject* found = PyDict_New();
  if (found != nullptr && !(put(found, "cpu", split(GEFFECT_FAST_CPU_OPS)) &&
                            put(found, "cuda", split(GEFFECT_FAST_CUDA_OPS)))) {
    Py_CLEAR(found);
  }
  return found;
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "g++ " __VERSION__;
#endif
  PyObject* info = PyDict_New();
  if (info != nullptr &&
      !(put(info, "compiler", PyUnicode_FromString(compiler)) &&
        put(info, "flags", PyUnicode_FromString(GEFFECT_FAST_FLAGS)) &&
        put(info, "cuda_version", cuda_version()) && put(info, "architectures", architectures()) &&
        put(info, "ops", ops()))) {
    Py_CLEAR(info);
  }
  return info;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "C++ compiler and flags, nvcc's version (None: no CUDA), architectures and the ops of each "
     "provider in the native build."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Describes the native build of geffect_fast.",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }

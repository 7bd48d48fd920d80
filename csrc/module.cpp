// The Python module geffect_fast._C, which describes the native build. The module includes no torch
// header; the kernels are in a library of their own (geffect_fast._kernels), which needs no Python.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) items.append(item);
  return items;
}

py::list architectures() {
#if defined(__x86_64__)
  std::string names = "x86-64,x86-64+avx2+fma (chosen at run time)";
#elif defined(__aarch64__)
  std::string names = "aarch64";
#else
  std::string names = "generic";
#endif
  return split(names + "," GEFFECT_FAST_CUDA_ARCHITECTURES);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = GEFFECT_FAST_FLAGS;
  const std::string cuda_version = GEFFECT_FAST_CUDA_VERSION;
  info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::str(cuda_version);
  info["architectures"] = architectures();
  py::dict ops;
  ops["cpu"] = split(GEFFECT_FAST_CPU_OPS);
  ops["cuda"] = split(GEFFECT_FAST_CUDA_OPS);
  info["ops"] = ops;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Describes the native build of geffect_fast.";
  m.def("build_info", &build_info,
        "C++ compiler and flags, nvcc's version (None: no CUDA), architectures and the ops of each "
        "provider in the native build.");
}

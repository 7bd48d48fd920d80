// The Python module geffect_fast._C: what the native build consists of. It includes no torch
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

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = GEFFECT_FAST_FLAGS;
  info["cuda_version"] = py::none();
#if defined(__x86_64__)
  info["architectures"] = split("x86-64,x86-64+avx2+fma (chosen at run time)");
#elif defined(__aarch64__)
  info["architectures"] = split("aarch64");
#else
  info["architectures"] = split("generic");
#endif
  info["ops"] = split(GEFFECT_FAST_OPS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Describes the native build of geffect_fast.";
  m.def(
      "build_info", &build_info,
      "Compiler, flags, CUDA version (None: no CUDA), architectures and ops of the native build.");
}

// Shared code of the kernels of tests/ops/test_cuda_shim.py: right kernels, whose results the test
// computes by itself, and broken kernels, which the shim must find.
#pragma once

#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"

namespace geffect_fast {

constexpr int kThreads = 64;

inline __device__ float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

using TestKernel = void (*)(const float*, float*);

// One block of kThreads, a float of dynamic shared memory each.
template <TestKernel kKernel>
Tensor run(const Tensor& x) {
  const Tensor out = new_float(x, {kThreads});
  Device(x).launch(kKernel, dim3(1), dim3(kThreads), kThreads * sizeof(float),
                   x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace geffect_fast

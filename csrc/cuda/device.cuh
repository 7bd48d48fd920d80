// The host side of a kernel call: the device and stream to run on, and launching.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"

// The dispatch key of this library's kernels. The tests compile these files as plain C++ and serve
// CPU tensors with them.
#ifndef GEFFECT_FAST_CUDA_KEY
#define GEFFECT_FAST_CUDA_KEY CUDA
#define GEFFECT_FAST_CUDA_NAMESPACE geffect_fast
#endif
#define GEFFECT_FAST_TEXT_(name) #name
#define GEFFECT_FAST_TEXT(name) GEFFECT_FAST_TEXT_(name)
// The full name of an op of this library, for the dispatcher.
#define GEFFECT_FAST_OP(op) GEFFECT_FAST_TEXT(GEFFECT_FAST_CUDA_NAMESPACE) "::" op

namespace geffect_fast {

inline constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Called before every launch of a kernel with dynamic shared memory. The limit is for static and
// dynamic memory together, so even a small request can exceed it. The limit set last holds, even if
// a launch that asked for less has set it.
inline void set_shared_memory_limit(const void* kernel, size_t bytes) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}

// Makes a tensor's device the current one for the life of the object, and knows torch's current
// stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()),
        guard_(static_cast<torch::stable::accelerator::DeviceIndex>(index_)) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int32_t index() const { return index_; }
  cudaStream_t stream() const { return stream_; }
  // 80, 89, 90, ...: ten times the major plus the minor compute capability.
  int capability() const {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
           attribute(cudaDevAttrComputeCapabilityMinor);
  }
  // Whether kernels that use instructions of sm_90a alone can run here: the build has their code.
  bool has_warpgroups() const {
#if defined(GEFFECT_FAST_SM90A)
    return capability() == 90;
#else
    return false;
#endif
  }
  int n_multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes of shared memory that one block may ask for.
  int shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int l2_bytes() const { return attribute(cudaDevAttrL2CacheSize); }

  // A grid for n_tasks of equal cost, one a block: enough blocks to keep the device busy to the
  // end; the kernel strides over the rest.
  dim3 grid_for_tiles(int64_t n_tasks) const {
    return dim3(static_cast<unsigned>(
        std::clamp<int64_t>(n_tasks, 1, int64_t{kWavesOfBlocks} * n_multiprocessors())));
  }

  // kernel<<<grid, block, shared_bytes, stream>>>(args...), its errors checked.
  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
              Args&&... args) const {
    if (shared_bytes > 0) {
      set_shared_memory_limit(reinterpret_cast<const void*>(kernel), shared_bytes);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
  }

 private:
  static constexpr int kWavesOfBlocks = 16;

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// A grid of at most `limit` blocks that covers n_tasks; the kernel strides over the rest.
inline dim3 grid_for(int64_t n_tasks, int64_t limit) {
  return dim3(static_cast<unsigned>(std::max<int64_t>(1, std::min(n_tasks, limit))));
}

// Calls body(T{}) with the element type that `dtype` names, one that the CUDA kernels serve.
template <class Body>
Tensor dispatch_cuda_dtype(const char* op, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", torch::headeronly::toString(dtype),
                      " has no CUDA kernel; use float32, or force_reference() for float64");
  }
}

// A new fp32 tensor on the device of `like`, not filled.
inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

}  // namespace geffect_fast

#define GEFFECT_FAST_REGISTER_(ns, key, op) \
  STABLE_TORCH_LIBRARY_IMPL(ns, key, m) { m.impl(#op, TORCH_BOX(&geffect_fast::op)); }
#define GEFFECT_FAST_REGISTER_EXPANDED_(ns, key, op) GEFFECT_FAST_REGISTER_(ns, key, op)
// Registers geffect_fast::op as the CUDA kernel of the op of that name; once a file, outside any
// namespace.
#define GEFFECT_FAST_REGISTER_CUDA(op) \
  GEFFECT_FAST_REGISTER_EXPANDED_(GEFFECT_FAST_CUDA_NAMESPACE, GEFFECT_FAST_CUDA_KEY, op)

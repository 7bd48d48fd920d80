// Launches that a device refuses, for one reason each, and the nearest launches that it takes.
#include "selftest.cuh"

namespace geffect_fast {
namespace {

// A launch that raises no limits, as Device::launch does.
template <class... Params, class... Args>
void launch_plainly(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

// `reverse` by way of kBytes of static shared memory, and dynamic shared memory that is not used.
template <int kBytes>
__global__ void with_static_kernel(const float* x, float* out) {
  __shared__ float shared[kBytes / sizeof(float)];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

template <int kBytes>
Tensor static_and_dynamic(const Tensor& x, int64_t bytes, bool raise_limit) {
  const Tensor out = new_float(x, {kThreads});
  const Device device(x);
  const auto kernel = with_static_kernel<kBytes>;
  if (raise_limit) {
    device.launch(kernel, dim3(1), dim3(kThreads), bytes, x.const_data_ptr<float>(),
                  out.mutable_data_ptr<float>());
  } else {
    launch_plainly(kernel, dim3(1), dim3(kThreads), bytes, device.stream(),
                   x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  }
  return out;
}

// Any grid and block: the first thread of each block of the first row of blocks counts.
__global__ void __launch_bounds__(1024) grid_kernel(float* out) {
  if (threadIdx.x + threadIdx.y + threadIdx.z + blockIdx.y + blockIdx.z == 0) out[blockIdx.x] = 1.f;
}

Tensor grid_of(const Tensor& like, int64_t x, int64_t y, int64_t z, int64_t block_x,
               int64_t block_z) {
  const Tensor out = new_float(like, {x});
  const dim3 grid(x, y, z), block(block_x, 1, block_z);
  Device(like).launch(grid_kernel, grid, block, 0, out.mutable_data_ptr<float>());
  return out;
}

template <int kBound>
__global__ void __launch_bounds__(kBound) bounded_kernel(float* out) {
  out[threadIdx.x] = 1.f;
}
__global__ void unbounded_kernel(float* out) { out[threadIdx.x] = 1.f; }

Tensor bounds(const Tensor& like, int64_t threads, bool with_bounds) {
  const Tensor out = new_float(like, {threads});
  Device(like).launch(with_bounds ? bounded_kernel<128> : unbounded_kernel, dim3(1),
                      dim3(static_cast<unsigned>(threads)), 0, out.mutable_data_ptr<float>());
  return out;
}

template <int kBytes>
struct Parameters {
  unsigned char bytes[kBytes];
};

template <int kBytes>
__global__ void parameters_kernel(const __grid_constant__ Parameters<kBytes> parameters,
                                  float* out) {
  out[threadIdx.x] = parameters.bytes[threadIdx.x];
}

template <int kBytes>
Tensor parameters(const Tensor& like) {
  const Tensor out = new_float(like, {kThreads});
  Device(like).launch(parameters_kernel<kBytes>, dim3(1), dim3(kThreads), 0, Parameters<kBytes>{},
                      out.mutable_data_ptr<float>());
  return out;
}

Tensor host_pointer(const Tensor& x) {
  const Tensor out = new_float(x, {kThreads});
  const float on_host[kThreads] = {};
  Device(x).launch(with_static_kernel<1024>, dim3(1), dim3(kThreads), 0, +on_host,
                   out.mutable_data_ptr<float>());
  return out;
}

Tensor other_stream(const Tensor& x) {
  const Tensor out = new_float(x, {kThreads});
  const Device device(x);
  launch_plainly(with_static_kernel<1024>, dim3(1), dim3(kThreads), 0, nullptr,
                 x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(cuda_shim_selftest, CPU, m) {
  using namespace geffect_fast;
  m.impl("statics_1_kib", TORCH_BOX(&static_and_dynamic<1024>));
  m.impl("statics_49_kib", TORCH_BOX(&static_and_dynamic<49 * 1024>));
  m.impl("grid_of", TORCH_BOX(&grid_of));
  m.impl("bounds", TORCH_BOX(&bounds));
  m.impl("parameters_fit", TORCH_BOX(&parameters<32752>));
  m.impl("parameters_too_large", TORCH_BOX(&parameters<32760>));
  m.impl("host_pointer", TORCH_BOX(&host_pointer));
  m.impl("other_stream", TORCH_BOX(&other_stream));
}

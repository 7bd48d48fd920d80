// Right kernels, which test the shim's results.
#include "selftest.cuh"

namespace geffect_fast {
namespace {

__global__ void places_kernel(float* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = static_cast<float>(100 * block + thread);
}

__global__ void reverse_kernel(const float* x, float* out) {
  shared_floats()[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared_floats()[kThreads - 1 - threadIdx.x];
}

// Without a barrier of the block: each warp for itself.
__global__ void reverse_in_warp_kernel(const float* x, float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 31];
}

template <class T>
__global__ void shuffles_kernel(const T* x, T* out) {
  const int lane = threadIdx.x % kWarp;
  const T value = x[threadIdx.x];
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const T results[] = {
      __shfl_sync(~0u, value, lane + 5), __shfl_sync(~0u, value, 3, 8),
      __shfl_up_sync(~0u, value, 2),     __shfl_up_sync(~0u, value, 2, 8),
      __shfl_down_sync(~0u, value, 3),   __shfl_down_sync(~0u, value, 3, 16),
      __shfl_xor_sync(~0u, value, 21),   __shfl_xor_sync(~0u, value, 9, 8),
      __shfl_xor_sync(half, value, 7),
  };
  int row = 0;
  for (const T& result : results) out[row++ * kThreads + threadIdx.x] = result;
}

__global__ void votes_kernel(const float* x, float* out) {
  const bool yes = x[threadIdx.x] > 0;
  const int results[] = {
      __popc(__ballot_sync(~0u, yes)),
      __ffs(__ballot_sync(~0u, yes)),
      __any_sync(~0u, yes),
      __all_sync(~0u, yes),
      __syncthreads_count(yes),
      __syncthreads_or(yes),
      __syncthreads_and(yes),
  };
  int row = 0;
  for (int result : results) out[row++ * kThreads + threadIdx.x] = static_cast<float>(result);
}

// One warp: fragments of the 32 rows of x, 8 elements each, as two elements a register.
template <bool kTranspose>
__global__ void fragments_kernel(const uint16_t* x, uint32_t* out) {
  auto* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  copy_async_16(rows + threadIdx.x * 8, x + threadIdx.x * 8, 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t fragment[4];
  load_matrices<kTranspose>(fragment, rows + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = fragment[i];
}

// One warp: out (16, 8) = 1 + a (16, 16) b (16, 8), operands and result read and written by the
// documented places.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* out) {
  const int q = threadIdx.x / 4, r = threadIdx.x % 4 * 2;
  const auto pair = [](const T& low, const T& high) { return low.x | uint32_t{high.x} << 16; };
  const auto a_pair = [&](int row, int col) {
    return pair(a[row * 16 + col], a[row * 16 + col + 1]);
  };
  const auto b_pair = [&](int row) { return pair(b[row * 8 + q], b[(row + 1) * 8 + q]); };
  const uint32_t left[4] = {a_pair(q, r), a_pair(q + 8, r), a_pair(q, r + 8), a_pair(q + 8, r + 8)};
  const uint32_t right[2] = {b_pair(r), b_pair(r + 8)};
  float sum[4] = {1.f, 1.f, 1.f, 1.f};
  multiply_add<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) out[(q + i / 2 * 8) * 8 + r + i % 2] = sum[i];
}

// Four floats a thread, of which `bytes` are copied.
__global__ void partial_copy_kernel(const float* x, float* out, int bytes) {
  float* own = shared_floats() + threadIdx.x * 4;
  copy_async_16(own, x + threadIdx.x * 4, bytes);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = own[i];
}

// ---- launchers ----

// A right use of torch's own functions, which work on the device.
Tensor torch_calls(const Tensor& x) {
  Tensor out = run<reverse_kernel>(x);
  return run<reverse_kernel>(torch::stable::clone(out));
}

Tensor places(const Tensor& like) {
  const Tensor out = new_float(like, {2 * 3 * 2, 4 * 3 * 5});
  Device(like).launch(places_kernel, dim3(2, 3, 2), dim3(4, 3, 5), 0,
                      out.mutable_data_ptr<float>());
  return out;
}

template <class T>
Tensor shuffles_typed(const Tensor& x) {
  const Tensor out = torch::stable::new_empty(x, {9, kThreads});
  Device(x).launch(shuffles_kernel<T>, dim3(1), dim3(kThreads), 0, x.const_data_ptr<T>(),
                   out.mutable_data_ptr<T>());
  return out;
}

Tensor shuffles(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Int:
      return shuffles_typed<int32_t>(x);
    case ScalarType::Long:
      return shuffles_typed<int64_t>(x);
    case ScalarType::Float:
      return shuffles_typed<float>(x);
    default:
      return shuffles_typed<double>(x);
  }
}

Tensor votes(const Tensor& x) {
  const Tensor out = new_float(x, {7, kThreads});
  Device(x).launch(votes_kernel, dim3(1), dim3(kThreads), 0, x.const_data_ptr<float>(),
                   out.mutable_data_ptr<float>());
  return out;
}

// x: 16-bit integers (32, 8).
Tensor fragments(const Tensor& x, bool transpose) {
  const Tensor out = torch::stable::new_empty(x, {kWarp, 4, 2});
  Device(x).launch(transpose ? fragments_kernel<true> : fragments_kernel<false>, dim3(1),
                   dim3(kWarp), kWarp * 16, static_cast<const uint16_t*>(x.const_data_ptr()),
                   static_cast<uint32_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = new_float(a, {16, 8});
  const auto launch = [&](auto type) {
    using T = decltype(type);
    Device(a).launch(product_kernel<T>, dim3(1), dim3(kWarp), 0, a.const_data_ptr<T>(),
                     b.const_data_ptr<T>(), out.mutable_data_ptr<float>());
  };
  if (a.scalar_type() == ScalarType::Half) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  return out;
}

Tensor partial_copy(const Tensor& x, int64_t bytes) {
  const Tensor out = new_float(x, {x.size(0)});
  Device(x).launch(partial_copy_kernel, dim3(1), dim3(x.size(0) / 4), x.size(0) * sizeof(float),
                   x.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                   static_cast<int>(bytes));
  return out;
}

// `reverse` with `bytes` of dynamic shared memory and `threads` in each of `blocks` blocks.
Tensor reverse_as(const Tensor& x, int64_t blocks, int64_t threads, int64_t bytes) {
  const Tensor out = new_float(x, {kThreads});
  Device(x).launch(reverse_kernel, dim3(static_cast<unsigned>(blocks)),
                   dim3(static_cast<unsigned>(threads)), static_cast<size_t>(bytes),
                   x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(cuda_shim_selftest, CPU, m) {
  using namespace geffect_fast;
  m.impl("reverse", TORCH_BOX(&run<reverse_kernel>));
  m.impl("reverse_in_warp", TORCH_BOX(&run<reverse_in_warp_kernel>));
  m.impl("places", TORCH_BOX(&places));
  m.impl("shuffles", TORCH_BOX(&shuffles));
  m.impl("votes", TORCH_BOX(&votes));
  m.impl("fragments", TORCH_BOX(&fragments));
  m.impl("product", TORCH_BOX(&product));
  m.impl("partial_copy", TORCH_BOX(&partial_copy));
  m.impl("reverse_as", TORCH_BOX(&reverse_as));
  m.impl("torch_calls", TORCH_BOX(&torch_calls));
}

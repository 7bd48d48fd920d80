// Small kernels for tests/ops/test_cuda_shim.py: right ones, whose results the test computes by
// itself, and broken ones, which the shim must find.
#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/warpgroup.cuh"

namespace geffect_fast {
namespace {

constexpr int kThreads = 64;

__device__ float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// ---- right ----

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

// What is left out of warpgroup_kernel, which is right with kNothing.
enum class Without : int { kNothing, kFence, kBarrier, kBegin, kCommit, kWait, kWaitBeforeCopy };

// Copies `rows` rows of 64 elements, `ld` apart, permuted for a warpgroup's instruction.
__device__ void copy_rows(unsigned char* to, const uint16_t* from, int rows, int ld) {
  for (int item = threadIdx.x; item < rows * 8; item += blockDim.x) {
    const int row = item / 8, chunk = item % 8;
    copy_async_16(to + row * 128 + (chunk ^ row % 8) * 16, from + row * ld + chunk * 8, 16);
  }
}

// One warpgroup: out (64, 128) = x (64, 64) y (128, 64)^T, kTransposed x (64, 64)^T y (64, 128).
template <bool kTransposed, Without kWithout>
__global__ void warpgroup_kernel(const uint16_t* x, const uint16_t* y, float* out) {
  constexpr int kPanel = 64 * 128;
  unsigned char* x_tile = dynamic_shared();
  unsigned char* y_tile = x_tile + kPanel;
  copy_rows(x_tile, x, 64, 64);
  copy_rows(y_tile, y, 64, kTransposed ? 128 : 64);
  copy_rows(y_tile + kPanel, y + (kTransposed ? 64 : 64 * 64), 64, kTransposed ? 128 : 64);
  copy_async_commit();
  copy_async_wait<0>();
  if (kWithout != Without::kFence) publish_to_warpgroups();
  if (kWithout != Without::kBarrier) __syncthreads();
  float sum[16][4] = {};
  const uint64_t left = describe_tile<kTransposed>(x_tile, kPanel);
  const uint64_t right = describe_tile<kTransposed>(y_tile, kPanel);
  if (kWithout != Without::kBegin) warpgroup_begin();
  for (int k = 0; k < 64; k += 16) {
    const int step = k * (kTransposed ? 128 : 2) / 16;
    warpgroup_multiply_add<BFloat16, kTransposed>(sum, left + step, right + step);
  }
  if (kWithout != Without::kCommit) warpgroup_commit();
  if (kWithout == Without::kWaitBeforeCopy) copy_rows(x_tile, x, 64, 64);
  if (kWithout != Without::kWait) warpgroup_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  for (int j = 0; j < 16; ++j) {
    for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * 128 + 8 * j + col + e % 2] = sum[j][e];
  }
}

// Four floats a thread, of which `bytes` are copied.
__global__ void partial_copy_kernel(const float* x, float* out, int bytes) {
  float* own = shared_floats() + threadIdx.x * 4;
  copy_async_16(own, x + threadIdx.x * 4, bytes);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = own[i];
}

// ---- broken: all but the line in question is as in a right kernel ----

__global__ void missing_barrier_kernel(const float* x, float* out) {
  shared_floats()[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared_floats()[kThreads - 1 - threadIdx.x];
}

__global__ void missing_syncwarp_kernel(const float* x, float* out) {
  shared_floats()[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared_floats()[threadIdx.x ^ 31];
}

__global__ void divergent_barrier_kernel(const float* x, float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void missing_lanes_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 2);
}

__global__ void barrier_or_shuffle_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % kWarp < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  }
}

__global__ void mixed_collectives_kernel(const float* x, float* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(~0u, x[threadIdx.x], 1)
                                          : __shfl_down_sync(~0u, x[threadIdx.x], 1);
}

__global__ void mixed_masks_kernel(const float* x, float* out) {
  const unsigned mask = threadIdx.x % kWarp < 16 ? 0x0000ffffu : ~0u;
  out[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

__global__ void foreign_lane_kernel(const float* x, float* out) {
  const unsigned mask = threadIdx.x % kWarp < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 16);
}

__global__ void lane_outside_mask_kernel(const float* x, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
}

__global__ void shared_overrun_kernel(const float* x, float* out) {
  shared_floats()[threadIdx.x + 4] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void unwritten_shared_kernel(const float*, float* out) {
  out[threadIdx.x] = shared_floats()[threadIdx.x];
}

// In a template, as the shared variables of most kernels are.
template <class T>
__global__ void unwritten_static_shared_kernel(const T* x, T* out) {
  __shared__ T shared[kThreads];
  if (x[threadIdx.x] < 0) shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void static_shared_overrun_kernel(const float* x, float* out) {
  __shared__ float shared[2][kThreads / 2];
  shared[0][threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[0][threadIdx.x];
}

template <int kLine>
__device__ void copied(const float* x, float* out) {
  float* own = shared_floats() + threadIdx.x % 16 * 4;
  copy_async_16(own, x + threadIdx.x % 16 * 4, 16);
  if (kLine != 1) copy_async_commit();
  if (kLine != 2) copy_async_wait<kLine == 3 ? 1 : 0>();
  if (kLine != 4) __syncthreads();
  out[threadIdx.x] = shared_floats()[kThreads - 1 - threadIdx.x];
}
__global__ void copied_kernel(const float* x, float* out) { copied<0>(x, out); }
__global__ void missing_commit_kernel(const float* x, float* out) { copied<1>(x, out); }
__global__ void missing_wait_kernel(const float* x, float* out) { copied<2>(x, out); }
__global__ void wait_for_too_few_kernel(const float* x, float* out) { copied<3>(x, out); }
__global__ void missing_barrier_after_wait_kernel(const float* x, float* out) { copied<4>(x, out); }

__global__ void copy_over_what_is_read_kernel(const float* x, float* out) {
  copied<0>(x, out);
  if (threadIdx.x < 16) copy_async_16(shared_floats() + threadIdx.x * 4, x, 16);
}

__global__ void misaligned_copy_kernel(const float* x, float* out) {
  copy_async_16(shared_floats(), x + 1, 16);
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void copy_to_global_kernel(const float* x, float* out) { copy_async_16(out, x, 16); }

__global__ void misaligned_vector_kernel(const float* x, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(x + threadIdx.x % 32);
  out[threadIdx.x] = four.x;
}

__global__ void misaligned_fragment_kernel(const float* x, float* out) {
  uint32_t fragment[4];
  load_matrices<false>(fragment, shared_floats() + threadIdx.x % 8);
  out[threadIdx.x] = x[threadIdx.x] + fragment[0];
}

__global__ void array_overrun_kernel(const float* x, float* out) {
  float local[8] = {};
  for (int i = 0; i < 8; ++i) local[i] = x[i];
  out[threadIdx.x] = local[threadIdx.x % 9];
}

__global__ void wide_shift_kernel(const float*, float* out) {
  out[threadIdx.x] = static_cast<float>(1u << threadIdx.x);
}

__global__ void read_behind_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x + 1];
}
__global__ void read_before_kernel(const float* x, float* out) {
  out[threadIdx.x] = x[threadIdx.x - 1024];
}
__global__ void write_behind_kernel(const float* x, float* out) {
  out[threadIdx.x + 1] = x[threadIdx.x];
}

__global__ void unwritten_result_kernel(const float* x, float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = x[threadIdx.x];
}

__global__ void deep_stack_kernel(const float* x, float* out) {
  volatile float local[1 << 17];
  for (int i = (1 << 17) - 1; i >= 0; --i) local[i] = x[threadIdx.x];
  out[threadIdx.x] = local[threadIdx.x];
}

// ---- launchers ----

using TestKernel = void (*)(const float*, float*);

// One block of kThreads, a float of dynamic shared memory each.
template <TestKernel kKernel>
Tensor run(const Tensor& x) {
  const Tensor out = new_float(x, {kThreads});
  Device(x).launch(kKernel, dim3(1), dim3(kThreads), kThreads * sizeof(float),
                   x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

// Broken: reads on the host what lies on the device.
Tensor host_read(const Tensor& x) {
  const Tensor out = run<reverse_kernel>(x);
  STD_TORCH_CHECK(x.const_data_ptr<float>()[3] > 0);
  return out;
}

// Right: torch's own functions work on the device.
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

template <Without kWithout>
Tensor warpgroup_product(const Tensor& x, const Tensor& y, bool transpose) {
  const Tensor out = new_float(x, {64, 128});
  Device(x).launch(transpose ? warpgroup_kernel<true, kWithout> : warpgroup_kernel<false, kWithout>,
                   dim3(1), dim3(128), 3 * 64 * 128,
                   static_cast<const uint16_t*>(x.const_data_ptr()),
                   static_cast<const uint16_t*>(y.const_data_ptr()), out.mutable_data_ptr<float>());
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
  m.impl("missing_barrier", TORCH_BOX(&run<missing_barrier_kernel>));
  m.impl("missing_syncwarp", TORCH_BOX(&run<missing_syncwarp_kernel>));
  m.impl("divergent_barrier", TORCH_BOX(&run<divergent_barrier_kernel>));
  m.impl("missing_lanes", TORCH_BOX(&run<missing_lanes_kernel>));
  m.impl("barrier_or_shuffle", TORCH_BOX(&run<barrier_or_shuffle_kernel>));
  m.impl("mixed_collectives", TORCH_BOX(&run<mixed_collectives_kernel>));
  m.impl("mixed_masks", TORCH_BOX(&run<mixed_masks_kernel>));
  m.impl("foreign_lane", TORCH_BOX(&run<foreign_lane_kernel>));
  m.impl("lane_outside_mask", TORCH_BOX(&run<lane_outside_mask_kernel>));
  m.impl("shared_overrun", TORCH_BOX(&run<shared_overrun_kernel>));
  m.impl("unwritten_shared", TORCH_BOX(&run<unwritten_shared_kernel>));
  m.impl("static_shared_overrun", TORCH_BOX(&run<static_shared_overrun_kernel>));
  m.impl("copied", TORCH_BOX(&run<copied_kernel>));
  m.impl("missing_commit", TORCH_BOX(&run<missing_commit_kernel>));
  m.impl("missing_wait", TORCH_BOX(&run<missing_wait_kernel>));
  m.impl("wait_for_too_few", TORCH_BOX(&run<wait_for_too_few_kernel>));
  m.impl("missing_barrier_after_wait", TORCH_BOX(&run<missing_barrier_after_wait_kernel>));
  m.impl("copy_over_what_is_read", TORCH_BOX(&run<copy_over_what_is_read_kernel>));
  m.impl("misaligned_copy", TORCH_BOX(&run<misaligned_copy_kernel>));
  m.impl("copy_to_global", TORCH_BOX(&run<copy_to_global_kernel>));
  m.impl("misaligned_vector", TORCH_BOX(&run<misaligned_vector_kernel>));
  m.impl("misaligned_fragment", TORCH_BOX(&run<misaligned_fragment_kernel>));
  m.impl("array_overrun", TORCH_BOX(&run<array_overrun_kernel>));
  m.impl("wide_shift", TORCH_BOX(&run<wide_shift_kernel>));
  m.impl("read_behind", TORCH_BOX(&run<read_behind_kernel>));
  m.impl("read_before", TORCH_BOX(&run<read_before_kernel>));
  m.impl("write_behind", TORCH_BOX(&run<write_behind_kernel>));
  m.impl("unwritten_result", TORCH_BOX(&run<unwritten_result_kernel>));
  m.impl("deep_stack", TORCH_BOX(&run<deep_stack_kernel>));
  m.impl("unwritten_static_shared", TORCH_BOX(&run<unwritten_static_shared_kernel<float>>));
  m.impl("places", TORCH_BOX(&places));
  m.impl("shuffles", TORCH_BOX(&shuffles));
  m.impl("votes", TORCH_BOX(&votes));
  m.impl("fragments", TORCH_BOX(&fragments));
  m.impl("product", TORCH_BOX(&product));
  m.impl("partial_copy", TORCH_BOX(&partial_copy));
  m.impl("reverse_as", TORCH_BOX(&reverse_as));
  m.impl("warpgroup", TORCH_BOX(&warpgroup_product<Without::kNothing>));
  m.impl("warpgroup_fence", TORCH_BOX(&warpgroup_product<Without::kFence>));
  m.impl("warpgroup_barrier", TORCH_BOX(&warpgroup_product<Without::kBarrier>));
  m.impl("warpgroup_begin", TORCH_BOX(&warpgroup_product<Without::kBegin>));
  m.impl("warpgroup_commit", TORCH_BOX(&warpgroup_product<Without::kCommit>));
  m.impl("warpgroup_wait", TORCH_BOX(&warpgroup_product<Without::kWait>));
  m.impl("warpgroup_wait_before_copy", TORCH_BOX(&warpgroup_product<Without::kWaitBeforeCopy>));
  m.impl("host_read", TORCH_BOX(&host_read));
  m.impl("torch_calls", TORCH_BOX(&torch_calls));
}

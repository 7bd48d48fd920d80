// Broken kernels: each differs from a right one in one line.
#include "selftest.cuh"

namespace geffect_fast {
namespace {

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

// A kernel with a shared variable in a template, as in most kernels.
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

__global__ void misaligned_copy_target_kernel(const float* x, float* out) {
  copy_async_16(shared_floats() + 1, x, 16);
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void copy_from_shared_kernel(const float* x, float* out) {
  copy_async_16(shared_floats(), shared_floats() + 4, 16);
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void copy_from_local_kernel(const float* x, float* out) {
  const float4 local = make_float4(x[0], x[1], x[2], x[3]);
  copy_async_16(shared_floats(), &local, 16);
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

// Reads device memory on the host.
Tensor host_read(const Tensor& x) {
  const Tensor out = run<copied_kernel>(x);
  STD_TORCH_CHECK(x.const_data_ptr<float>()[3] > 0);
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(cuda_shim_selftest, CPU, m) {
  using namespace geffect_fast;
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
  m.impl("misaligned_copy_target", TORCH_BOX(&run<misaligned_copy_target_kernel>));
  m.impl("copy_from_shared", TORCH_BOX(&run<copy_from_shared_kernel>));
  m.impl("copy_from_local", TORCH_BOX(&run<copy_from_local_kernel>));
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
  m.impl("host_read", TORCH_BOX(&host_read));
}

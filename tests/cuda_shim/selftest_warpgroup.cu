// A product by a warpgroup's instruction, right and with one line left out.
#include "cuda/warpgroup.cuh"
#include "selftest.cuh"

namespace geffect_fast {
namespace {

// The line that warpgroup_kernel leaves out; with kNothing the kernel is right.
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

template <Without kWithout>
Tensor warpgroup_product(const Tensor& x, const Tensor& y, bool transpose) {
  const Tensor out = new_float(x, {64, 128});
  Device(x).launch(transpose ? warpgroup_kernel<true, kWithout> : warpgroup_kernel<false, kWithout>,
                   dim3(1), dim3(128), 3 * 64 * 128,
                   static_cast<const uint16_t*>(x.const_data_ptr()),
                   static_cast<const uint16_t*>(y.const_data_ptr()), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(cuda_shim_selftest, CPU, m) {
  using namespace geffect_fast;
  m.impl("warpgroup", TORCH_BOX(&warpgroup_product<Without::kNothing>));
  m.impl("warpgroup_fence", TORCH_BOX(&warpgroup_product<Without::kFence>));
  m.impl("warpgroup_barrier", TORCH_BOX(&warpgroup_product<Without::kBarrier>));
  m.impl("warpgroup_begin", TORCH_BOX(&warpgroup_product<Without::kBegin>));
  m.impl("warpgroup_commit", TORCH_BOX(&warpgroup_product<Without::kCommit>));
  m.impl("warpgroup_wait", TORCH_BOX(&warpgroup_product<Without::kWait>));
  m.impl("warpgroup_wait_before_copy", TORCH_BOX(&warpgroup_product<Without::kWaitBeforeCopy>));
}

// Hopper's copy engine (TMA), the barriers that its copies complete, and blocks that share their
// shared memory (clusters). Machine code exists for sm_90 and later.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/vector.cuh"

namespace geffect_fast {

// ---- the host's side ----

// A matrix as the copy engine reads it: boxes of `box_rows` rows by 128 bytes, which arrive in
// shared memory in the arrangement of panel_offset; zeros outside of the matrix.
template <class T>
CUtensorMap describe_matrix(const Tensor& matrix, int box_rows) {
  static_assert(sizeof(T) == 2);
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                    cudaEnableDefault, &result));
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess,
                    "the driver knows no cuTensorMapEncodeTiled; update it");
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.size(1)),
                               static_cast<cuuint64_t>(matrix.size(0))};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.stride(0)) * sizeof(T)};
  const cuuint32_t box[2] = {128 / sizeof(T), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode(
      &map,
      std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(matrix.const_data_ptr()), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ",
                  static_cast<int>(status));
  return map;
}

// Whether the copy engine can read a matrix: unit column stride, rows on 16 bytes, and sizes that
// its coordinates hold.
template <class T>
bool fits_copy_engine(const Tensor& matrix) {
  return matrix.numel() > 0 && matrix.stride(1) == 1 &&
         rows_are_aligned(static_cast<const T*>(matrix.const_data_ptr()), matrix.stride(0)) &&
         matrix.stride(0) >= matrix.size(1) && matrix.size(0) <= INT32_MAX &&
         matrix.size(1) <= INT32_MAX;
}

// A kernel, and blocks of it that share their shared memory.
struct Clusters {
  const void* kernel;
  int threads, blocks;  // of a block, of a cluster
  size_t shared_bytes;

  // Clusters that the device runs at once.
  int64_t resident(const Device& device) const {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, size_t>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    int& found = known[{device.index(), kernel, blocks, shared_bytes}];
    if (found == 0) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
      cudaLaunchAttribute attribute;
      cudaLaunchConfig_t config = configuration(device, blocks, &attribute);
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found, kernel, &config));
      STD_TORCH_CHECK(found > 0, "clusters of ", blocks, " blocks do not fit this device");
    }
    return found;
  }

  // Launches n clusters. The kernel may begin before the one before it on the stream has ended, see
  // wait_for_previous_kernel.
  template <class... Params, class... Args>
  void launch(const Device& device, int64_t n, void (*typed)(Params...), Args&&... args) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = configuration(device, n * blocks, attributes);
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, typed, std::forward<Args>(args)...));
  }

 private:
  cudaLaunchConfig_t configuration(const Device& device, int64_t grid,
                                   cudaLaunchAttribute* cluster) const {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = device.stream();
    config.attrs = cluster;
    config.numAttrs = 1;
    return config;
  }
};

// ---- barriers in shared memory ----

using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last barrier_init, and before others (blocks of the cluster, the copy engine) use them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// One arrival, and `bytes` of copies that must arrive too.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// The same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits for the end of the phase of this parity; what other blocks wrote before they arrived is
// visible then.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- copies ----

__device__ __forceinline__ void prefetch_matrix(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Copies the box at (row, col) to `to`, which begins on 1024 bytes.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int row, int col,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];\n" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// ---- clusters ----

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
}

// Waits until all threads of the cluster's blocks are here.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Stores to the place that corresponds to `to` in block `rank`.
__device__ __forceinline__ void store_at(float4* to, int rank, float4 value) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

}  // namespace geffect_fast

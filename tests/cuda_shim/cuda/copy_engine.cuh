// Emulation of csrc/cuda/copy_engine.cuh, which this file replaces by the order of include folders.
//
// The blocks of a cluster run together. A copy arrives when no thread of its cluster can go on
// without it, and until then its target holds NaN.
#pragma once

#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/vector.cuh"
#include "fibres.h"

namespace geffect_fast {

struct CUtensorMap {
  const uint16_t* data;
  int64_t rows, cols, row_stride;
  int box_rows;
};

template <class T>
CUtensorMap describe_matrix(const Tensor& matrix, int box_rows) {
  if (box_rows < 1 || box_rows > 256) cuda_shim::fail("a box of more than 256 rows");
  return {static_cast<const uint16_t*>(matrix.const_data_ptr()), matrix.size(0), matrix.size(1),
          matrix.stride(0), box_rows};
}

template <class T>
bool fits_copy_engine(const Tensor& matrix) {
  return matrix.numel() > 0 && matrix.stride(1) == 1 &&
         rows_are_aligned(static_cast<const T*>(matrix.const_data_ptr()), matrix.stride(0)) &&
         matrix.stride(0) >= matrix.size(1);
}

struct Clusters {
  const void* kernel;
  int threads, blocks;
  size_t shared_bytes;

  int64_t resident(const Device& device) const {
    return std::max(1, device.n_multiprocessors() / blocks);
  }

  template <class... Params, class... Args>
  void launch(const Device& device, int64_t n, void (*typed)(Params...), Args&&... args) const {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(n * blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = device.stream();
    cuda_shim::ClusterLaunch cluster(blocks);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, typed, std::forward<Args>(args)...));
  }
};

using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, int arrivals) {
  cuda_shim::barrier_init(barrier, arrivals);
}
inline void publish_barriers() {}
inline void barrier_expect(Barrier* barrier, int bytes) {
  cuda_shim::barrier_arrive(barrier, bytes);
}
inline void barrier_arrive(Barrier* barrier) { cuda_shim::barrier_arrive(barrier, 0); }
inline void barrier_arrive_at(Barrier* barrier, int rank) {
  cuda_shim::barrier_arrive(static_cast<Barrier*>(cuda_shim::in_block(barrier, rank)), 0);
}
inline void barrier_wait(Barrier* barrier, int parity) { cuda_shim::barrier_wait(barrier, parity); }

inline void prefetch_matrix(const CUtensorMap*) {}

inline void copy_box(void* to, const CUtensorMap* map, int row, int col, Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) {
    cuda_shim::fail("a box that does not begin on 1024 bytes");
  }
  constexpr int kCols = 64;
  const CUtensorMap from = *map;
  auto* target = static_cast<unsigned char*>(to);
  cuda_shim::copy_later(to, from.box_rows * kCols * 2, barrier, [=] {
    for (int r = 0; r < from.box_rows; ++r) {
      for (int c = 0; c < kCols; ++c) {
        const bool inside =
            row + r >= 0 && row + r < from.rows && col + c >= 0 && col + c < from.cols;
        const uint16_t value = inside ? from.data[(row + r) * from.row_stride + col + c] : 0;
        const int chunk = c / 8 ^ (r & 7);  // the 128-byte swizzle
        std::memcpy(target + r * 128 + chunk * 16 + c % 8 * 2, &value, 2);
      }
    }
  });
}

inline int cluster_rank() { return cuda_shim::cluster_rank(); }
inline void cluster_sync() { cuda_shim::cluster_barrier(); }
inline void store_at(float4* to, int rank, float4 value) {
  *static_cast<float4*>(cuda_shim::in_block(to, rank)) = value;
}

}  // namespace geffect_fast

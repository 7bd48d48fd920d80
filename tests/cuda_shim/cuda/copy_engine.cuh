// Emulation of csrc/cuda/copy_engine.cuh, which this file replaces by the order of include folders.
//
// The blocks of a cluster run together. A copy arrives when no thread of its cluster can go on
// without the copy; until then its target holds NaN.
#pragma once

#include <cuda.h>

#include <cstring>

#include "cuda/intrinsics.cuh"
#include "cuda/vector.cuh"
#include "fibres.h"

namespace geffect_fast {

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
  const CUtensorMap from = *map;
  auto* target = static_cast<unsigned char*>(to);
  cuda_shim::copy_later(to, from.box_rows * from.box_cols * 2, barrier, [=] {
    for (int r = 0; r < from.box_rows; ++r) {
      for (int c = 0; c < from.box_cols; ++c) {
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

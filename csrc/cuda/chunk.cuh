// Shared code of the ops that are limited by memory: the chunk of a row that a lane reads at once
// (16 bytes or, where rows are strided or not aligned, one element), and many sums over a warp.
#pragma once

#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace geffect_fast {

// 16-byte loads that a lane issues before it uses the first: 4 KiB a warp, 48 KiB and more a
// multiprocessor with the 8 to 24 warps for which the kernels' registers leave room. The latency of
// memory, about 0.8 us, hides behind 30 KiB at 5 TB/s over 132 multiprocessors.
inline constexpr int kLoadsAtOnce = 8;

// kWidth elements of T: kVector<T> or 1.
template <class T, int kWidth>
using Chunk = std::conditional_t<(kWidth > 1), uint4, T>;

template <int kWidth, class T>
__device__ __forceinline__ Chunk<T, kWidth> load_chunk(const T* at) {
  return *reinterpret_cast<const Chunk<T, kWidth>*>(at);
}

// A chunk's elements as fp32, exactly.
template <class T, int kWidth>
__device__ __forceinline__ void widen_chunk(const Chunk<T, kWidth>& chunk, float (&out)[kWidth]) {
  if constexpr (kWidth > 1) {
    unpack(chunk, out, T{});
  } else {
    out[0] = static_cast<float>(chunk);
  }
}

// The warp's total of sums[lane / (32 / kN)], kN a power of two. Each exchange of lanes halves the
// number of sums a lane holds: 31 shuffles for 32 sums in place of 160.
template <int kN, int kDistance = kWarp / 2>
__device__ __forceinline__ float warp_sum_each(const float (&sums)[kN]) {
  if constexpr (kN == 1) {
    float sum = sums[0];
#pragma unroll
    for (int distance = kDistance; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    return sum;
  } else {
    const bool upper = (threadIdx.x & kDistance) != 0;
    float kept[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const float given = upper ? sums[i] : sums[i + kN / 2];
      kept[i] =
          (upper ? sums[i + kN / 2] : sums[i]) + __shfl_xor_sync(0xffffffffu, given, kDistance);
    }
    return warp_sum_each<kN / 2, kDistance / 2>(kept);
  }
}

}  // namespace geffect_fast

// Loads of 16 bytes and sums over a warp, for kernels that are limited by memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace geffect_fast {

// Elements of T in 16 bytes.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// 16 bytes of T as fp32, exactly.
__device__ __forceinline__ void unpack(const uint4& bits, float (&out)[4], float) {
  out[0] = __uint_as_float(bits.x);
  out[1] = __uint_as_float(bits.y);
  out[2] = __uint_as_float(bits.z);
  out[3] = __uint_as_float(bits.w);
}
__device__ __forceinline__ void unpack(const uint4& bits, float (&out)[8], BFloat16) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& bits, float (&out)[8], Half) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Half low, high;
    low.x = static_cast<unsigned short>(words[i] & 0xffffu);
    high.x = static_cast<unsigned short>(words[i] >> 16);
    out[2 * i] = static_cast<float>(low);
    out[2 * i + 1] = static_cast<float>(high);
  }
}

// Whether `pointer` and rows `stride` elements apart all begin on 16 bytes.
template <class T>
bool rows_are_aligned(const T* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % kVector<T> == 0;
}

// The sum over the lanes of a warp, in a fixed order, in every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace geffect_fast

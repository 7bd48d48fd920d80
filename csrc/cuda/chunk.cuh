// What a lane reads of a row at once: 16 bytes, or one element where rows are strided or not
// aligned.
#pragma once

#include "cuda/vector.cuh"

namespace geffect_fast {

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

}  // namespace geffect_fast

// Descriptions of matrices for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace geffect_fast {

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

// Whether the copy engine can read a matrix, or a stack of them: unit column stride, rows on 16
// bytes, and sizes that its coordinates hold.
template <class T>
bool fits_copy_engine(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool fits = x.numel() > 0 && x.stride(last) == 1 &&
              rows_are_aligned(static_cast<const T*>(x.const_data_ptr()), x.stride(last - 1)) &&
              x.stride(last - 1) >= x.size(last);
  for (int64_t i = 0; i <= last; ++i) fits = fits && x.size(i) <= INT32_MAX;
  for (int64_t i = 0; i < last - 1; ++i) fits = fits && x.stride(i) % kVector<T> == 0;
  return fits;
}

}  // namespace geffect_fast

// csrc/cuda/gemm.h with another matmul_fp32: torch's products with fp32 results of low-precision
// inputs exist on CUDA only.
#pragma once

#define matmul_fp32 matmul_fp32_on_cuda
#include "../../../csrc/cuda/gemm.h"
#undef matmul_fp32

namespace geffect_fast {

inline Tensor matmul_fp32(const Tensor& x, const Tensor& y) {
  return torch::stable::matmul(torch::stable::to(x, ScalarType::Float),
                               torch::stable::to(y, ScalarType::Float));
}

}  // namespace geffect_fast

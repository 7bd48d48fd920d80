// Emulation of csrc/cuda/gemm.h, which this file replaces by the order of include folders: torch's
// products with fp32 results of low-precision inputs exist on CUDA only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/dtype.h"

namespace geffect_fast {

inline Tensor matmul_fp32(const Tensor& x, const Tensor& y) {
  return torch::stable::matmul(torch::stable::to(x, ScalarType::Float),
                               torch::stable::to(y, ScalarType::Float));
}

}  // namespace geffect_fast

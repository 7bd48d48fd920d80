// Matrix products by torch (cuBLAS).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "common/dtype.h"

namespace geffect_fast {

// x (m, k) y (k, n) in fp32, low-precision products summed and returned without rounding.
inline Tensor matmul_fp32(const Tensor& x, const Tensor& y) {
  using torch::stable::detail::from;
  if (x.scalar_type() == ScalarType::Float) return torch::stable::matmul(x, y);
  std::array<StableIValue, 3> stack{from(x), from(y), from(ScalarType::Float)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace geffect_fast

// The checks that keep a kernel memory-safe when it is called past the checks of geffect_fast/ops.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "common/dtype.h"

namespace geffect_fast {

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) {
    same = same && tensor.size(dim) == size;
    ++dim;
  }
  STD_TORCH_CHECK(same, op, ": `", name, "` has the wrong shape");
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, op, ": `", name, "` must have ", dim, " dimensions");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": `", name, "` must have dtype ",
                  torch::headeronly::toString(dtype));
}

// A CUDA kernel that is called with tensors of several devices would read wild memory.
inline void check_one_device(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->device() == (*tensors.begin())->device(), op,
                    ": all arguments must be on one device");
  }
}

// Offsets 0 = c_0 <= c_1 <= ... <= c_n = total_tokens, read from an int32 or int64 tensor.
inline std::vector<int64_t> read_offsets(const char* op, const char* name, const Tensor& tensor,
                                         int64_t total_tokens) {
  check_dim(op, name, tensor, 1);
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  std::vector<int64_t> offsets(count);
  if (tensor.scalar_type() == ScalarType::Int) {
    const int32_t* data = tensor.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < count; ++i) offsets[i] = data[i * stride];
  } else {
    const int64_t* data = tensor.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) offsets[i] = data[i * stride];
  }
  STD_TORCH_CHECK(count > 0 && offsets.front() == 0 && offsets.back() == total_tokens, op, ": `",
                  name, "` must run from 0 to total_tokens");
  for (int64_t i = 1; i < count; ++i) {
    STD_TORCH_CHECK(offsets[i - 1] <= offsets[i], op, ": `", name, "` must not decrease");
  }
  return offsets;
}

}  // namespace geffect_fast

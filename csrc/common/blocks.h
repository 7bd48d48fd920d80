// Blocks of a strided matrix as dense fp32 (fp64) rows, and GEMM on them through ATen.
//
// A kernel asks for a block; where the tensor already has the accumulation type and unit inner
// stride it gets a pointer into it, else a copy in its scratch memory. Any strides work, nothing is
// copied whole.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>

#include "common/vec.h"

namespace geffect_fast {

// rows x cols elements of a tensor; strides in elements, 0 along an expanded dimension.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;

  const T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }

  bool operator==(const Matrix& other) const {
    return data == other.data && rows == other.rows && cols == other.cols &&
           row_stride == other.row_stride && col_stride == other.col_stride;
  }
};

// The last two dimensions of a tensor, `index` along the first of three.
template <class T>
Matrix<T> matrix_of(const Tensor& tensor, int64_t index = 0) {
  const int64_t last = tensor.dim() - 1;
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  if (tensor.dim() == 3) data += index * tensor.stride(0);
  return {data, tensor.size(last - 1), tensor.size(last), tensor.stride(last - 1),
          tensor.stride(last)};
}

// Copies n elements `stride` apart to dense accumulation type.
template <class T>
void gather(const T* src, int64_t n, int64_t stride, acc_t<T>* dst) {
  if constexpr (!std::is_same_v<T, acc_t<T>>) {
    if (stride == 1) return widen(src, n, dst);
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<acc_t<T>>(src[i * stride]);
}

// n dense elements of a row from (row, col); `scratch` holds n.
template <class T>
const acc_t<T>* dense_row(const Matrix<T>& m, int64_t row, int64_t col, int64_t n,
                          acc_t<T>* scratch) {
  const T* src = m.at(row, col);
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (m.col_stride == 1) return src;
  }
  gather(src, n, m.col_stride, scratch);
  return scratch;
}

// A dense block: unit inner stride, rows `ld` apart.
template <class A>
struct Block {
  const A* data;
  int64_t rows, cols, ld;
};

// Rows [row, row + rows) x columns [col, col + cols) of `m`; `scratch` holds rows * cols.
template <class T>
Block<acc_t<T>> dense_block(const Matrix<T>& m, int64_t row, int64_t rows, int64_t col,
                            int64_t cols, acc_t<T>* scratch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (m.col_stride == 1) return {m.at(row, col), rows, cols, m.row_stride};
  }
  if (m.row_stride == 1) {  // column-major: walk the memory in its order
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        scratch[r * cols + c] = static_cast<acc_t<T>>(*m.at(row + r, col + c));
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      gather(m.at(row + r, col), cols, m.col_stride, scratch + r * cols);
    }
  }
  return {scratch, rows, cols, cols};
}

enum class Transpose { kNo, kYes };

// The part of a result that is asked for; elements left of its diagonal may keep their values.
enum class Part { kAll, kUpper };

// `gemm` in fp32 on the processors that `packed_gemm_serves`, on the calling thread alone.
void packed_gemm(float* out, const Block<float>& x, Transpose tx, const Block<float>& y,
                 Transpose ty, bool accumulate, Part part);
void packed_row_dots(double* out, const Block<float>& x, const Block<float>& y,
                     const Block<float>& z);
bool packed_gemm_serves();

// out (rows x cols, dense) = or += op(x) op(y), in the accumulation type, by torch's BLAS where
// that is as fast as `packed_gemm`.
// Called from inside a parallel region it runs on the calling thread alone.
template <class A>
void gemm(A* out, const Block<A>& x, Transpose tx, const Block<A>& y, Transpose ty, bool accumulate,
          Part part = Part::kAll) {
  if constexpr (std::is_same_v<A, float>) {
    if (packed_gemm_serves()) return packed_gemm(out, x, tx, y, ty, accumulate, part);
  }
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, 0);
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  using Sizes = std::array<int64_t, 2>;
  const auto wrap = [&](const A* data, Sizes sizes, Sizes strides) {
    return torch::stable::from_blob(const_cast<A*>(data), sizes, strides, cpu, dtype);
  };
  const auto operand = [&](const Block<A>& b, Transpose t) {
    return t == Transpose::kNo ? wrap(b.data, {b.rows, b.cols}, {b.ld, 1})
                               : wrap(b.data, {b.cols, b.rows}, {1, b.ld});
  };
  const Tensor left = operand(x, tx), right = operand(y, ty);
  const int64_t rows = left.size(0), cols = right.size(1);
  const Tensor result = wrap(out, {rows, cols}, {cols, 1});
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

// out[i] += <row i of x y^T, row i of z>; `scratch` holds x.rows * y.rows.
template <class A>
void row_dots(double* out, const Block<A>& x, const Block<A>& y, const Block<A>& z, A* scratch) {
  if constexpr (std::is_same_v<A, float>) {
    if (packed_gemm_serves()) return packed_row_dots(out, x, y, z);
  }
  gemm(scratch, x, Transpose::kNo, y, Transpose::kYes, false);
  for (int64_t i = 0; i < x.rows; ++i) {
    out[i] += dot<A>(scratch + i * y.rows, z.data + i * z.ld, y.rows);
  }
}

}  // namespace geffect_fast

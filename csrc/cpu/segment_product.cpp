// segment_product: out[i, :] = sum_{t in segment i} x_t * y_t, elementwise
//
// x, y (total_tokens, d), cu_seqlens (n + 1) -> (n, d); any strides.
// A task owns a block of columns of one segment. Pieces of its tokens are summed in the
// accumulation type and added up in double, in order. Limiter: bytes of x and y.
#include <torch/csrc/stable/library.h>

#include "common/blocks.h"
#include "common/checks.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_product";
constexpr int64_t kPieceTokens = 32;
constexpr int64_t kColumns = 1024;

template <class T>
std::vector<double> segment_product_kernel(const Tensor& x_tensor, const Tensor& y_tensor,
                                           const std::vector<int64_t>& offsets) {
  using A = acc_t<T>;
  const Matrix<T> x = matrix_of<T>(x_tensor), y = matrix_of<T>(y_tensor);
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t n_blocks = ceil_div(x.cols, kColumns);
  std::vector<double> out(n_samples * x.cols, 0.0);
  run_tasks<A>(n_samples * n_blocks, 3 * kColumns, [&](int64_t task, A* scratch) {
    const int64_t segment = task / n_blocks, col = task % n_blocks * kColumns;
    const int64_t cols = std::min(kColumns, x.cols - col), end = offsets[segment + 1];
    double* total = out.data() + segment * x.cols + col;
    for (int64_t begin = offsets[segment]; begin < end; begin += kPieceTokens) {
      A* sum = scratch + 2 * kColumns;
      std::fill_n(sum, cols, A{0});
      for (int64_t t = begin; t < std::min(begin + kPieceTokens, end); ++t) {
        const A* x_row = dense_row(x, t, col, cols, scratch);
        add_products(x_row, dense_row(y, t, col, cols, scratch + kColumns), cols, sum);
      }
      for (int64_t j = 0; j < cols; ++j) total[j] += sum[j];
    }
  });
  return out;
}

Tensor segment_product(const Tensor& x, const Tensor& y, const Tensor& cu_seqlens) {
  check_dim(kOp, "x", x, 2);
  check_shape(kOp, "y", y, {x.size(0), x.size(1)});
  check_dtype(kOp, "y", y, x.scalar_type());
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, x.size(0));
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  return dispatch_dtype(kOp, x.scalar_type(), [&](auto type) {
    return to_result(x, {n_samples, x.size(1)},
                     segment_product_kernel<decltype(type)>(x, y, offsets));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("segment_product", TORCH_BOX(&geffect_fast::segment_product));
}

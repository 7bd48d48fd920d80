// segment_dot: out[k, m, i] = sum_{t in segment i} z[m, t] . g[k, t]
//
// z (M, total_tokens, d), g (K, total_tokens, d), cu_seqlens (n + 1) -> (K, M, n); any strides.
// A task owns a piece of one segment's tokens and K * M sums of its own; the rows of a token are
// cut into chunks of which all K + M stay in the first-level cache, so memory is read once whatever
// K and M are. Pieces are added in order. Limiter: bytes of z and g.
#include <torch/csrc/stable/library.h>

#include "common/blocks.h"
#include "common/checks.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_dot";
constexpr int64_t kPieceTokens = 32;
constexpr int64_t kChunk = 1024;  // elements of a row read at once

template <class T>
std::vector<double> segment_dot_kernel(const Tensor& z, const Tensor& g,
                                       const std::vector<int64_t>& offsets) {
  using A = acc_t<T>;
  const int64_t n_z = z.size(0), n_g = g.size(0), d = z.size(2);
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<Matrix<T>> matrices;  // K of g, then M of z
  for (int64_t k = 0; k < n_g; ++k) matrices.push_back(matrix_of<T>(g, k));
  for (int64_t m = 0; m < n_z; ++m) matrices.push_back(matrix_of<T>(z, m));

  const std::vector<Piece> pieces = cut_segments(offsets, kPieceTokens);
  const int64_t n_pairs = n_g * n_z, n_rows = n_g + n_z;
  std::vector<double> partial(pieces.size() * n_pairs, 0.0);
  run_tasks<A>(pieces.size(), n_rows * kChunk, [&](int64_t task, A* scratch) {
    std::vector<const A*> rows(n_rows);
    for (int64_t t = pieces[task].begin; t < pieces[task].end; ++t) {
      for (int64_t col = 0; col < d; col += kChunk) {
        const int64_t cols = std::min(kChunk, d - col);
        for (int64_t r = 0; r < n_rows; ++r) {
          rows[r] = dense_row(matrices[r], t, col, cols, scratch + r * kChunk);
        }
        dot_rows(rows.data(), n_g, rows.data() + n_g, n_z, cols, partial.data() + task * n_pairs);
      }
    }
  });

  std::vector<double> out(n_pairs * n_samples, 0.0);
  for (size_t p = 0; p < pieces.size(); ++p) {
    for (int64_t pair = 0; pair < n_pairs; ++pair) {
      out[pair * n_samples + pieces[p].segment] += partial[p * n_pairs + pair];
    }
  }
  return out;
}

Tensor segment_dot(const Tensor& z, const Tensor& g, const Tensor& cu_seqlens) {
  check_dim(kOp, "z", z, 3);
  check_shape(kOp, "g", g, {g.size(0), z.size(1), z.size(2)});
  check_dtype(kOp, "g", g, z.scalar_type());
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, z.size(1));
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  return dispatch_dtype(kOp, z.scalar_type(), [&](auto type) {
    return to_result(z, {g.size(0), z.size(0), n_samples},
                     segment_dot_kernel<decltype(type)>(z, g, offsets));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("segment_dot", TORCH_BOX(&geffect_fast::segment_dot));
}

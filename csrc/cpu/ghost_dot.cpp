// ghost_dot: out[i, j] = < sum_{s in segment i} g_s a_s^T, sum_{t in segment2 j} g2_t a2_t^T >_F
//
// a (T, d_in), g (T, d_out), cu_seqlens (N + 1), a2 (T2, d_in), g2 (T2, d_out), cu_seqlens2 (N2 +
// 1)
//   -> (N, N2); any strides.
//
// Two exact forms:
//   pairs     sum_{s, t} (a_s . a2_t)(g_s . g2_t): a task owns all pairs of a few whole segments of
//             each set, tile by tile.                                   T T2 (d_in + d_out)
//             multiply-adds
//   gradient  for one tile of the gradients after another, the tile of all N + N2 gradients, then
//             their inner products.                                     (T + T2 + N N2) d_in d_out
// Memory is O(N N2) and tiles. Limiter: arithmetic.
#include <torch/csrc/stable/library.h>

#include "common/blocks.h"
#include "common/checks.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_dot";

// Pairs: tokens of either set in a tile, and features multiplied at once.
constexpr int64_t kPairTokens = 256;
constexpr int64_t kFeatures = 2048;
// Gradients: tokens multiplied at once, rows of the result a task owns, and the tiles' size.
constexpr int64_t kInnerTokens = 1024;
constexpr int64_t kResultRows = 32;
constexpr int64_t kTileOut = 128;
constexpr int64_t kTileIn = 256;
constexpr int64_t kMinTileOut = 16;
constexpr int64_t kTileBudget = int64_t{1} << 22;  // elements of all gradients' tiles together

template <class T>
struct Side {
  Matrix<T> a, g;
  const std::vector<int64_t>& offsets;

  int64_t n_samples() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

// Consecutive segments [first, last) that make up one tile, or one long segment.
struct Group {
  int64_t first, last;
};

std::vector<Group> group_segments(const std::vector<int64_t>& offsets) {
  std::vector<Group> groups;
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t first = 0, last; first < n_samples; first = last) {
    last = first + 1;
    while (last < n_samples && offsets[last + 1] - offsets[first] <= kPairTokens) ++last;
    groups.push_back({first, last});
  }
  return groups;
}

// out (rows x cols) = inner products of rows of x from `row` with rows of y from `col`.
template <class T>
void token_gram(acc_t<T>* out, const Matrix<T>& x, int64_t row, int64_t rows, const Matrix<T>& y,
                int64_t col, int64_t cols, acc_t<T>* scratch) {
  for (int64_t f = 0; f < x.cols; f += kFeatures) {
    const int64_t features = std::min(kFeatures, x.cols - f);
    const auto left = dense_block(x, row, rows, f, features, scratch);
    const auto right = dense_block(y, col, cols, f, features, scratch + rows * features);
    gemm(out, left, Transpose::kNo, right, Transpose::kYes, f > 0);
  }
}

template <class T>
std::vector<double> by_pairs(const Side<T>& x, const Side<T>& y) {
  using A = acc_t<T>;
  const std::vector<Group> x_groups = group_segments(x.offsets),
                           y_groups = group_segments(y.offsets);
  const int64_t n_y = y_groups.size(), n_columns = y.n_samples();
  std::vector<double> out(x.n_samples() * n_columns, 0.0);
  const int64_t features = std::min(kFeatures, std::max(x.a.cols, x.g.cols));
  const int64_t scratch_size = 2 * kPairTokens * (kPairTokens + features);
  run_tasks<A>(x_groups.size() * n_y, scratch_size, [&](int64_t task, A* scratch) {
    const Group rows_of = x_groups[task / n_y], cols_of = y_groups[task % n_y];
    A* gram_a = scratch;
    A* gram_g = gram_a + kPairTokens * kPairTokens;
    A* copies = gram_g + kPairTokens * kPairTokens;
    const int64_t s_end = x.offsets[rows_of.last], t_end = y.offsets[cols_of.last];
    for (int64_t s = x.offsets[rows_of.first]; s < s_end; s += kPairTokens) {
      const int64_t rows = std::min(kPairTokens, s_end - s);
      for (int64_t t = y.offsets[cols_of.first]; t < t_end; t += kPairTokens) {
        const int64_t cols = std::min(kPairTokens, t_end - t);
        token_gram(gram_a, x.a, s, rows, y.a, t, cols, copies);
        token_gram(gram_g, x.g, s, rows, y.g, t, cols, copies);
        for (int64_t i = rows_of.first; i < rows_of.last; ++i) {
          const int64_t from = std::max(x.offsets[i], s), to = std::min(x.offsets[i + 1], s + rows);
          for (int64_t r = from; r < to; ++r) {
            for (int64_t j = cols_of.first; j < cols_of.last; ++j) {
              const int64_t left = std::max(y.offsets[j], t);
              const int64_t right = std::min(y.offsets[j + 1], t + cols);
              if (left >= right) continue;
              const int64_t at = (r - s) * cols + left - t;
              out[i * n_columns + j] += dot(gram_a + at, gram_g + at, right - left);
            }
          }
        }
      }
    }
  });
  return out;
}

// The tile [out, out + rows) x [in, in + cols) of segment i's gradient.
template <class T>
void gradient_tile(acc_t<T>* tile, const Side<T>& side, int64_t i, int64_t out, int64_t rows,
                   int64_t in, int64_t cols, acc_t<T>* scratch) {
  const int64_t begin = side.offsets[i], end = side.offsets[i + 1];
  if (begin == end) std::fill(tile, tile + rows * cols, acc_t<T>{0});
  for (int64_t t = begin; t < end; t += kInnerTokens) {
    const int64_t tokens = std::min(kInnerTokens, end - t);
    const auto g = dense_block(side.g, t, tokens, out, rows, scratch);
    const auto a = dense_block(side.a, t, tokens, in, cols, scratch + kInnerTokens * rows);
    gemm(tile, g, Transpose::kYes, a, Transpose::kNo, t > begin);
  }
}

template <class T>
std::vector<double> by_gradients(const Side<T>& x, const Side<T>& y) {
  using A = acc_t<T>;
  const int64_t n_rows = x.n_samples(), n_columns = y.n_samples();
  const int64_t d_in = x.a.cols, d_out = x.g.cols;
  const int64_t budget = kTileBudget / (n_rows + n_columns) / kTileIn;
  const int64_t tile_out = std::min(kTileOut, std::max(kMinTileOut, budget));
  const int64_t tile_size = std::min(tile_out, d_out) * std::min(kTileIn, d_in);
  const Scratch<A> tiles((n_rows + n_columns) * tile_size);
  std::vector<double> result(n_rows * n_columns, 0.0);
  for (int64_t out = 0; out < d_out; out += tile_out) {
    for (int64_t in = 0; in < d_in; in += kTileIn) {
      const int64_t rows = std::min(tile_out, d_out - out), cols = std::min(kTileIn, d_in - in);
      const int64_t size = rows * cols;
      run_tasks<A>(n_rows + n_columns, kInnerTokens * (rows + cols), [&](int64_t i, A* scratch) {
        A* tile = tiles.data() + i * size;
        if (i < n_rows) {
          gradient_tile(tile, x, i, out, rows, in, cols, scratch);
        } else {
          gradient_tile(tile, y, i - n_rows, out, rows, in, cols, scratch);
        }
      });
      const Block<A> columns{tiles.data() + n_rows * size, n_columns, size, size};
      run_tasks<A>(
          ceil_div(n_rows, kResultRows), kResultRows * n_columns, [&](int64_t task, A* sums) {
            const int64_t first = task * kResultRows, count = std::min(kResultRows, n_rows - first);
            const Block<A> block{tiles.data() + first * size, count, size, size};
            gemm(sums, block, Transpose::kNo, columns, Transpose::kYes, false);
            for (int64_t r = 0; r < count * n_columns; ++r)
              result[first * n_columns + r] += sums[r];
          });
    }
  }
  return result;
}

template <class T>
bool gradient_form_is_cheaper(const Side<T>& x, const Side<T>& y) {
  const double t = x.a.rows, t2 = y.a.rows, d_in = x.a.cols, d_out = x.g.cols;
  const double products = static_cast<double>(x.n_samples()) * y.n_samples();
  return (t + t2 + products) * d_in * d_out < t * t2 * (d_in + d_out);
}

Tensor ghost_dot(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens, const Tensor& a2,
                 const Tensor& g2, const Tensor& cu_seqlens2) {
  for (const Tensor* tensor : {&a, &g, &a2, &g2}) {
    check_dim(kOp, "a, g, a2, g2", *tensor, 2);
    check_dtype(kOp, "a, g, a2, g2", *tensor, a.scalar_type());
  }
  check_shape(kOp, "g", g, {a.size(0), g.size(1)});
  check_shape(kOp, "a2", a2, {a2.size(0), a.size(1)});
  check_shape(kOp, "g2", g2, {a2.size(0), g.size(1)});
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  const std::vector<int64_t> offsets2 = read_offsets(kOp, "cu_seqlens2", cu_seqlens2, a2.size(0));
  return dispatch_dtype(kOp, a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Side<T> x{matrix_of<T>(a), matrix_of<T>(g), offsets};
    const Side<T> y{matrix_of<T>(a2), matrix_of<T>(g2), offsets2};
    return to_result(a, {x.n_samples(), y.n_samples()},
                     gradient_form_is_cheaper(x, y) ? by_gradients(x, y) : by_pairs(x, y));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("ghost_dot", TORCH_BOX(&geffect_fast::ghost_dot));
}

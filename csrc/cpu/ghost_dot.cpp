// ghost_dot: out[i, j] = < sum_{s in segment i} g_s a_s^T, sum_{t in segment2 j} g2_t a2_t^T >_F
//
// a (T, d_in), g (T, d_out), cu_seqlens (N + 1), a2 (T2, d_in), g2 (T2, d_out),
// cu_seqlens2 (N2 + 1) -> (N, N2); any strides.
//
// Two exact forms:
//   pairs     sum_{s, t} (a_s . a2_t)(g_s . g2_t): a task owns all pairs of a few whole segments of
//             each set, tile by tile.                                   T T2 (d_in + d_out)
//             multiply-adds
//   gradient  for one tile of the gradients after another, the tile of all N + N2 gradients, then
//             their inner products.                                     (T + T2 + N N2) d_in d_out
// A set with itself (the same tensors) is symmetric: half the pairs, and N gradients only.
// Memory is O(N N2) and tiles: in the gradient form (fp32) 4 MiB, or 128 KiB for each of more than
// 32 samples.
// Limiter: arithmetic.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/products.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_dot";

constexpr int64_t kPairTokens = 256;  // tokens of either set in a tile of pairs
constexpr int64_t kResultRows = 8;    // rows of the result a task owns in the gradient form
constexpr int64_t kTilesRows = 2048;  // of the tiles of all samples: they stay in the last cache
constexpr int64_t kMinTileRows = 64;
constexpr int64_t kMaxTileRows = 512;

template <class T>
struct Side {
  Matrix<T> a, g;
  const std::vector<int64_t>& offsets;

  int64_t n_samples() const { return static_cast<int64_t>(offsets.size()) - 1; }

  bool operator==(const Side& other) const {
    return a == other.a && g == other.g && offsets == other.offsets;
  }
};

// Copies the computed half of a symmetric result to the other half.
void mirror(std::vector<double>& out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) out[i * n + j] = out[j * n + i];
  }
}

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

template <class T>
std::vector<double> by_pairs(const Side<T>& x, const Side<T>& y, bool symmetric) {
  using A = acc_t<T>;
  const std::vector<Group> x_groups = group_segments(x.offsets),
                           y_groups = group_segments(y.offsets);
  const int64_t n_y = y_groups.size(), n_columns = y.n_samples();
  std::vector<double> out(x.n_samples() * n_columns, 0.0);
  const int64_t features = std::min(kFeatures, std::max(x.a.cols, x.g.cols));
  const int64_t scratch_size = 2 * kPairTokens * (kPairTokens + features);
  run_tasks<A>(x_groups.size() * n_y, scratch_size, [&](int64_t task, A* scratch) {
    const Group rows_of = x_groups[task / n_y], cols_of = y_groups[task % n_y];
    if (symmetric && cols_of.last <= rows_of.first) return;
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
  if (symmetric) mirror(out, n_columns);
  return out;
}

template <class T>
std::vector<double> by_gradients(const Side<T>& x, const Side<T>& y, bool symmetric) {
  using A = acc_t<T>;
  const int64_t n_rows = x.n_samples(), n_columns = y.n_samples();
  const int64_t n_gradients = symmetric ? n_rows : n_rows + n_columns;
  const int64_t d_in = x.a.cols, d_out = x.g.cols;
  const int64_t tile_rows =
      std::clamp(kTilesRows / std::max<int64_t>(n_gradients, 1), kMinTileRows, kMaxTileRows);
  const Scratch<A> tiles(n_gradients * tile_at(0, 0, d_out, d_in, tile_rows).size());
  std::vector<double> result(n_rows * n_columns, 0.0);
  std::vector<const A*> at(n_gradients);
  const A* const* columns = at.data() + n_gradients - n_columns;
  for (int64_t out = 0; out < d_out; out += tile_rows) {
    for (int64_t in = 0; in < d_in; in += kTileIn) {
      const Tile tile = tile_at(out, in, d_out, d_in, tile_rows);
      const int64_t scratch_size = kInnerTokens * (tile.rows + tile.cols);
      run_tasks<A>(n_gradients, scratch_size, [&](int64_t task, A* scratch) {
        const Side<T>& side = task < n_rows ? x : y;
        const int64_t i = task < n_rows ? task : task - n_rows;
        A* gradient = tiles.data() + task * tile.size();
        at[task] = gradient;
        gradient_tile(gradient, side.a, side.g, side.offsets[i], side.offsets[i + 1], tile,
                      scratch);
      });
      run_tasks<A>(ceil_div(n_rows, kResultRows), 0, [&](int64_t task, A*) {
        const int64_t first = task * kResultRows, count = std::min(kResultRows, n_rows - first);
        const int64_t from = symmetric ? first : 0, width = n_columns - from;
        std::vector<double> products(count * width, 0.0);
        dot_rows(&at[first], count, columns + from, width, tile.size(), products.data());
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < width; ++j) {
            result[(first + i) * n_columns + from + j] += products[i * width + j];
          }
        }
      });
    }
  }
  if (symmetric) mirror(result, n_columns);
  return result;
}

// The cost of the inner product of two gradients, which runs from the caches: measured, as the
// number of tokens whose multiply-adds take as long.
constexpr double kProductTokens = 2.6;

template <class T>
bool gradient_form_is_cheaper(const Side<T>& x, const Side<T>& y, bool symmetric) {
  const double t = x.a.rows, t2 = y.a.rows, d_in = x.a.cols, d_out = x.g.cols;
  const double n = x.n_samples(), n2 = y.n_samples();
  // Half of a symmetric result, and the elements across its diagonal.
  const double pairs = symmetric ? t * (t + kPairTokens) / 2 : t * t2;
  const double products = symmetric ? n * (n + kResultRows) / 2 : n * n2;
  const double tokens = (symmetric ? t : t + t2) + kProductTokens * products;
  return tokens * d_in * d_out < pairs * (d_in + d_out);
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
    const bool symmetric = x == y;
    return to_result(a, {x.n_samples(), y.n_samples()},
                     gradient_form_is_cheaper(x, y, symmetric) ? by_gradients(x, y, symmetric)
                                                               : by_pairs(x, y, symmetric));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("ghost_dot", TORCH_BOX(&geffect_fast::ghost_dot));
}

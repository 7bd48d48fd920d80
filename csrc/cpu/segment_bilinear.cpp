// segment_bilinear: out[m, i] = sum_{t in segment i} g_t^T V_m a_t, or each token's term
//
// a (total_tokens, d_in), g (total_tokens, d_out), v (M, d_out, d_in), cu_seqlens (n + 1)
//   -> (M, n), per token (M, total_tokens); any strides.
//
// Two exact forms, arithmetic-bound both:
//   product   a tile of Z = A V_m^T, then its row-wise dot with G:   M * T * d_in * d_out
//             multiply-adds; a task owns (m, block of tokens, block of outputs).
//   gradient  a tile of segment i's own gradient G_i^T A_i, kept in cache, then its dot with every
//             V_m: T * d_in * d_out in GEMM whatever M is, and n * M * d_in * d_out in dots; a task
//             owns (tile, segment).
// Neither Z nor a gradient exists beyond a tile a thread.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/products.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_bilinear";

// Product form: tokens and outputs of a tile of Z.
constexpr int64_t kTokens = 512;
constexpr int64_t kOutputs = 256;

struct Problem {
  int64_t total_tokens, d_in, d_out, n_directions, n_samples;
};

// The gradient form costs a tile written and M tiles of V read for every segment, measured as the
// time of kTileTokens + kReadTokens * M tokens' multiply-adds.
constexpr double kTileTokens = 16, kReadTokens = 4;

bool gradient_form_is_cheaper(const Problem& p) {
  const double product = static_cast<double>(p.n_directions) * p.total_tokens;
  const double gradient =
      p.total_tokens + p.n_samples * (kTileTokens + kReadTokens * p.n_directions);
  return gradient < product;
}

template <class T>
std::vector<double> token_terms(const Matrix<T>& a, const Matrix<T>& g,
                                const std::vector<Matrix<T>>& v) {
  using A = acc_t<T>;
  const int64_t total_tokens = a.rows, d_in = a.cols, d_out = g.cols;
  const int64_t n_directions = v.size();
  const int64_t token_blocks = ceil_div(total_tokens, kTokens);
  const int64_t out_blocks = ceil_div(d_out, kOutputs);
  // partial[block of outputs][m][t]
  std::vector<double> partial(out_blocks * n_directions * total_tokens, 0.0);
  const int64_t tokens = std::min(kTokens, total_tokens), outputs = std::min(kOutputs, d_out);
  const int64_t scratch_size = tokens * (2 * outputs + d_in) + outputs * d_in;
  run_tasks<A>(out_blocks * n_directions * token_blocks, scratch_size,
               [&](int64_t task, A* scratch) {
                 const int64_t token = task % token_blocks * kTokens;
                 const int64_t m = task / token_blocks % n_directions;
                 const int64_t out_block = task / token_blocks / n_directions;
                 const int64_t out = out_block * kOutputs;
                 const int64_t rows = std::min(kTokens, total_tokens - token);
                 const int64_t cols = std::min(kOutputs, d_out - out);
                 A* z = scratch;
                 A* a_copy = z + tokens * outputs;
                 A* v_copy = a_copy + tokens * d_in;
                 A* g_copy = v_copy + outputs * d_in;
                 row_dots(partial.data() + (out_block * n_directions + m) * total_tokens + token,
                          dense_block(a, token, rows, 0, d_in, a_copy),
                          dense_block(v[m], out, cols, 0, d_in, v_copy),
                          dense_block(g, token, rows, out, cols, g_copy), z);
               });
  const int64_t n_terms = n_directions * total_tokens;
  std::vector<double> terms(n_terms, 0.0);
  for (int64_t block = 0; block < out_blocks; ++block) {
    for (int64_t i = 0; i < n_terms; ++i) terms[i] += partial[block * n_terms + i];
  }
  return terms;
}

template <class T>
std::vector<double> by_products(const Matrix<T>& a, const Matrix<T>& g,
                                const std::vector<Matrix<T>>& v,
                                const std::vector<int64_t>& offsets) {
  const std::vector<double> terms = token_terms(a, g, v);
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<double> out(v.size() * n_samples, 0.0);
  for (size_t m = 0; m < v.size(); ++m) {
    for (int64_t i = 0; i < n_samples; ++i) {
      for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) {
        out[m * n_samples + i] += terms[m * a.rows + t];
      }
    }
  }
  return out;
}

template <class T>
std::vector<double> by_gradients(const Matrix<T>& a, const Matrix<T>& g,
                                 const std::vector<Matrix<T>>& v,
                                 const std::vector<int64_t>& offsets) {
  using A = acc_t<T>;
  const int64_t d_in = a.cols, d_out = g.cols, n_directions = v.size();
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t in_tiles = ceil_div(d_in, kTileIn);
  const int64_t n_tiles = in_tiles * ceil_div(d_out, kTileOut);
  // partial[tile][segment][m]; consecutive tasks share the tile of V
  std::vector<double> partial(n_tiles * n_samples * n_directions, 0.0);
  const int64_t scratch_size = kTileOut * kTileIn + kTileScratch + n_directions * kTileIn;
  run_tasks<A>(n_tiles * n_samples, scratch_size, [&](int64_t task, A* scratch) {
    const int64_t segment = task % n_samples, corner = task / n_samples;
    const Tile tile =
        tile_at(corner / in_tiles * kTileOut, corner % in_tiles * kTileIn, d_out, d_in);
    A* gradient = scratch;
    A* copies = gradient + kTileOut * kTileIn;
    A* v_copy = copies + kTileScratch;
    gradient_tile(gradient, a, g, offsets[segment], offsets[segment + 1], tile, copies);
    std::vector<const A*> v_rows(n_directions);
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t m = 0; m < n_directions; ++m) {
        v_rows[m] = dense_row(v[m], tile.out + r, tile.in, tile.cols, v_copy + m * kTileIn);
      }
      const A* row = gradient + r * tile.cols;
      dot_rows(&row, 1, v_rows.data(), n_directions, tile.cols,
               partial.data() + task * n_directions);
    }
  });
  std::vector<double> result(n_directions * n_samples, 0.0);
  for (int64_t corner = 0; corner < n_tiles; ++corner) {
    for (int64_t i = 0; i < n_samples; ++i) {
      for (int64_t m = 0; m < n_directions; ++m) {
        result[m * n_samples + i] += partial[(corner * n_samples + i) * n_directions + m];
      }
    }
  }
  return result;
}

Tensor segment_bilinear(const Tensor& a, const Tensor& g, const Tensor& v, const Tensor& cu_seqlens,
                        bool per_token) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "g", g, 2);
  check_dim(kOp, "v", v, 3);
  const int64_t total_tokens = a.size(0), n_directions = v.size(0);
  check_shape(kOp, "g", g, {total_tokens, g.size(1)});
  check_shape(kOp, "v", v, {n_directions, g.size(1), a.size(1)});
  check_dtype(kOp, "g", g, a.scalar_type());
  check_dtype(kOp, "v", v, a.scalar_type());
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, total_tokens);
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  const Problem problem{total_tokens, a.size(1), g.size(1), n_directions, n_samples};
  return dispatch_dtype(kOp, a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Matrix<T> a_matrix = matrix_of<T>(a), g_matrix = matrix_of<T>(g);
    std::vector<Matrix<T>> directions;
    for (int64_t m = 0; m < n_directions; ++m) directions.push_back(matrix_of<T>(v, m));
    if (per_token) {
      return to_result(a, {n_directions, total_tokens},
                       token_terms(a_matrix, g_matrix, directions));
    }
    return to_result(a, {n_directions, n_samples},
                     gradient_form_is_cheaper(problem)
                         ? by_gradients(a_matrix, g_matrix, directions, offsets)
                         : by_products(a_matrix, g_matrix, directions, offsets));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("segment_bilinear", TORCH_BOX(&geffect_fast::segment_bilinear));
}

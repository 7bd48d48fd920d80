// ghost_norm: out[i] = || sum_{t in segment i} g_t a_t^T ||_F^2
//
// a (total_tokens, d_in), g (total_tokens, d_out), cu_seqlens (n + 1) -> (n); any strides.
//
// Two exact forms, chosen for each segment of T_i tokens by their multiply-adds:
//   Gram      sum_{s,t} (a_s . a_t)(g_s . g_t): a task owns the pairs of a block of tokens s with
//   all
//             t >= its first; tiles right of the diagonal count twice.    ~ T_i^2 (d_in + d_out) /
//             2
//   gradient  the sum of squares of G_i^T A_i: a task owns a tile of it.  T_i d_in d_out
// Neither a T_i x T_i Gram nor a gradient exists beyond a tile a thread. Limiter: arithmetic.
#include <torch/csrc/stable/library.h>

#include "common/blocks.h"
#include "common/checks.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_norm";

// Gram form: tokens s and t of a tile, and features multiplied at once.
constexpr int64_t kRowTokens = 128;
constexpr int64_t kColTokens = 256;
constexpr int64_t kFeatures = 2048;
// Gradient form: a tile of the gradient, and tokens multiplied at once.
constexpr int64_t kTileOut = 128;
constexpr int64_t kTileIn = 256;
constexpr int64_t kInnerTokens = 1024;

// A block of token pairs (first: a token) or a tile of the gradient (first, second: its corner).
struct Task {
  int64_t segment, first, second;
  bool gram;
};

bool gram_form_is_cheaper(int64_t tokens, int64_t d_in, int64_t d_out) {
  // One block holds the segment: both triangles are computed.
  const double pairs =
      static_cast<double>(tokens) * (tokens <= kRowTokens ? tokens : (tokens + kRowTokens) / 2);
  return pairs * (d_in + d_out) < static_cast<double>(tokens) * d_in * d_out;
}

template <class T>
std::vector<Task> plan(const Matrix<T>& a, const Matrix<T>& g,
                       const std::vector<int64_t>& offsets) {
  std::vector<Task> tasks;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    const int64_t segment = i, begin = offsets[i], end = offsets[i + 1];
    if (begin == end) continue;
    if (gram_form_is_cheaper(end - begin, a.cols, g.cols)) {
      for (int64_t s = begin; s < end; s += kRowTokens) tasks.push_back({segment, s, 0, true});
      continue;
    }
    for (int64_t out = 0; out < g.cols; out += kTileOut) {
      for (int64_t in = 0; in < a.cols; in += kTileIn) tasks.push_back({segment, out, in, false});
    }
  }
  return tasks;
}

// out (rows x cols) = inner products of tokens [row, row + rows) with tokens [col, col + cols).
template <class T>
void token_gram(acc_t<T>* out, const Matrix<T>& m, int64_t row, int64_t rows, int64_t col,
                int64_t cols, acc_t<T>* scratch) {
  for (int64_t f = 0; f < m.cols; f += kFeatures) {
    const int64_t features = std::min(kFeatures, m.cols - f);
    const auto left = dense_block(m, row, rows, f, features, scratch);
    const auto right = dense_block(m, col, cols, f, features, scratch + rows * features);
    gemm(out, left, Transpose::kNo, right, Transpose::kYes, f > 0);
  }
}

template <class T>
double gram_task(const Matrix<T>& a, const Matrix<T>& g, int64_t s, int64_t end,
                 acc_t<T>* scratch) {
  acc_t<T>* gram_a = scratch;
  acc_t<T>* gram_g = gram_a + kRowTokens * kColTokens;
  acc_t<T>* copies = gram_g + kRowTokens * kColTokens;
  const int64_t rows = std::min(kRowTokens, end - s);
  double sum = 0;
  for (int64_t t = s, cols; t < end; t += cols) {
    cols = t == s ? rows : std::min(kColTokens, end - t);
    token_gram(gram_a, a, s, rows, t, cols, copies);
    token_gram(gram_g, g, s, rows, t, cols, copies);
    const double weight = t == s ? 1 : 2;
    sum += weight * dot(gram_a, gram_g, rows * cols);
  }
  return sum;
}

template <class T>
double gradient_task(const Matrix<T>& a, const Matrix<T>& g, int64_t begin, int64_t end,
                     int64_t out, int64_t in, acc_t<T>* scratch) {
  const int64_t rows = std::min(kTileOut, g.cols - out), cols = std::min(kTileIn, a.cols - in);
  acc_t<T>* gradient = scratch;
  acc_t<T>* g_copy = gradient + kTileOut * kTileIn;
  acc_t<T>* a_copy = g_copy + kInnerTokens * kTileOut;
  for (int64_t t = begin; t < end; t += kInnerTokens) {
    const int64_t tokens = std::min(kInnerTokens, end - t);
    const auto g_block = dense_block(g, t, tokens, out, rows, g_copy);
    const auto a_block = dense_block(a, t, tokens, in, cols, a_copy);
    gemm(gradient, g_block, Transpose::kYes, a_block, Transpose::kNo, t > begin);
  }
  return dot(gradient, gradient, rows * cols);
}

template <class T>
std::vector<double> ghost_norm_kernel(const Tensor& a_tensor, const Tensor& g_tensor,
                                      const std::vector<int64_t>& offsets) {
  const Matrix<T> a = matrix_of<T>(a_tensor), g = matrix_of<T>(g_tensor);
  const std::vector<Task> tasks = plan(a, g, offsets);
  std::vector<double> partial(tasks.size());
  const int64_t features = std::min(kFeatures, std::max(a.cols, g.cols));
  const int64_t gram_size = 2 * kRowTokens * kColTokens + (kRowTokens + kColTokens) * features;
  const int64_t tile_size = kTileOut * kTileIn + kInnerTokens * (kTileOut + kTileIn);
  run_tasks<acc_t<T>>(
      tasks.size(), std::max(gram_size, tile_size), [&](int64_t i, acc_t<T>* scratch) {
        const Task& task = tasks[i];
        const int64_t begin = offsets[task.segment], end = offsets[task.segment + 1];
        partial[i] = task.gram ? gram_task(a, g, task.first, end, scratch)
                               : gradient_task(a, g, begin, end, task.first, task.second, scratch);
      });
  std::vector<double> out(offsets.size() - 1, 0.0);
  for (size_t i = 0; i < tasks.size(); ++i) out[tasks[i].segment] += partial[i];
  return out;
}

Tensor ghost_norm(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "g", g, 2);
  check_shape(kOp, "g", g, {a.size(0), g.size(1)});
  check_dtype(kOp, "g", g, a.scalar_type());
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  return dispatch_dtype(kOp, a.scalar_type(), [&](auto type) {
    return to_result(a, {n_samples}, ghost_norm_kernel<decltype(type)>(a, g, offsets));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("ghost_norm", TORCH_BOX(&geffect_fast::ghost_norm));
}

// ghost_norm: out[i] = || sum_{t in segment i} g_t a_t^T ||_F^2
// ghost_norm_of_one_input: its sum over several g, of layers that were called with one input
//
// a (total_tokens, d_in), g (total_tokens, d_out) each, cu_seqlens (n + 1) -> (n); any strides.
//
// Two exact forms, chosen for each segment of T_i tokens by their multiply-adds:
//   Gram      sum_{s,t} (a_s . a_t) sum_g (g_s . g_t): a task owns the pairs of a block of tokens
//             s with all t >= its first; tiles right of the diagonal count twice.
//             ~ T_i^2 (d_in + d_out) / 2. Of few tokens: one task, the upper triangle by dot
//             products.
//   gradient  the sum of squares of G_i^T A_i: a task owns a tile of it.  T_i d_in d_out
// Neither a T_i x T_i Gram nor a gradient exists beyond a tile a thread. Limiter: arithmetic.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/instructions.h"
#include "common/products.h"
#include "common/tasks.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_norm";

// Gram form: tokens s and t of a tile. Torch's BLAS computes what is left of the diagonal too, and
// is given few rows; `packed_gemm` leaves most of it out, and packs fewer times for more rows.
constexpr int64_t kMostRowTokens = 128;
constexpr int64_t kColTokens = 256;
constexpr int64_t kDiagonal = 32;  // columns computed left of the diagonal, and rows for BLAS

int64_t row_tokens() { return packed_gemm_serves() ? kMostRowTokens : kDiagonal; }

// Gram form of segments of few tokens: dot products of the triangle's rows, a strip of them at a
// time. Products would spend half of their time on packing so few rows. Narrow vectors need about
// the time that BLAS takes for all pairs, wide ones no more for an element than products do.
const bool kWide = instructions() == Instructions::kAvx512;
constexpr int64_t kMostShortTokens = 128;
const int64_t kShortTokens = kWide ? kMostShortTokens : 64;
constexpr int64_t kMostStrip = 4;
const int64_t kStrip = kWide ? kMostStrip : 2;
constexpr int64_t kMostTriangle = kMostShortTokens * (kMostShortTokens + kMostStrip) / 2;

// A block of token pairs (first: a token), or a tile of the gradient of one g (first, second: its
// corner).
struct Task {
  static constexpr int64_t kGram = -1;
  int64_t segment, first, second, g;

  bool gram() const { return g == kGram; }
};

bool gram_form_is_cheaper(int64_t tokens, int64_t d_in, int64_t d_out) {
  const int64_t columns = tokens > kShortTokens ? (tokens + kDiagonal) / 2
                          : kWide               ? (tokens + kStrip) / 2
                                                : tokens;
  const double pairs = static_cast<double>(tokens) * columns;
  return pairs * (d_in + d_out) < static_cast<double>(tokens) * d_in * d_out;
}

template <class T>
std::vector<Task> plan(const Matrix<T>& a, const std::vector<Matrix<T>>& gs,
                       const std::vector<int64_t>& offsets) {
  std::vector<Task> tasks;
  int64_t d_out = 0;
  for (const Matrix<T>& g : gs) d_out += g.cols;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    const int64_t segment = i, begin = offsets[i], end = offsets[i + 1];
    if (begin == end) continue;
    if (gram_form_is_cheaper(end - begin, a.cols, d_out)) {
      if (end - begin <= kShortTokens) {
        tasks.push_back({segment, begin, 0, Task::kGram});
        continue;
      }
      for (int64_t s = begin; s < end; s += row_tokens()) {
        tasks.push_back({segment, s, 0, Task::kGram});
      }
      continue;
    }
    for (size_t k = 0; k < gs.size(); ++k) {
      for (int64_t out = 0; out < gs[k].cols; out += kTileOut) {
        for (int64_t in = 0; in < a.cols; in += kTileIn) {
          tasks.push_back({segment, out, in, static_cast<int64_t>(k)});
        }
      }
    }
  }
  return tasks;
}

template <class T>
double gram_task(const Matrix<T>& a, const std::vector<Matrix<T>>& gs, int64_t s, int64_t end,
                 acc_t<T>* scratch) {
  acc_t<T>* gram_a = scratch;
  acc_t<T>* gram_g = gram_a + kMostRowTokens * kColTokens;
  acc_t<T>* copies = gram_g + kMostRowTokens * kColTokens;
  const int64_t rows = std::min(row_tokens(), end - s);
  double sum = 0;
  for (int64_t t = s; t < end; t += kColTokens) {
    const int64_t cols = std::min(kColTokens, end - t);
    const Part part = t == s ? Part::kUpper : Part::kAll;
    token_gram(gram_a, a, s, rows, a, t, cols, copies, false, part);
    for (const Matrix<T>& g : gs) {
      token_gram(gram_g, g, s, rows, g, t, cols, copies, &g != &gs.front(), part);
    }
    if (part == Part::kAll) {
      sum += 2 * dot(gram_a, gram_g, rows * cols);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * cols + r;
      sum += static_cast<double>(gram_a[at]) * gram_g[at];
      sum += 2 * dot(gram_a + at + 1, gram_g + at + 1, cols - r - 1);
    }
  }
  return sum;
}

// triangle (rows x rows, in strips: each strip's columns begin at its first row) += Gram matrix of
// tokens [begin, begin + rows); `copies` holds rows * kFeatures.
template <class T>
void token_triangle(double* triangle, const Matrix<T>& x, int64_t begin, int64_t rows,
                    acc_t<T>* copies) {
  const acc_t<T>* at[kMostShortTokens];
  for (int64_t f = 0; f < x.cols; f += kFeatures) {
    const int64_t features = std::min(kFeatures, x.cols - f);
    for (int64_t r = 0; r < rows; ++r) {
      at[r] = dense_row(x, begin + r, f, features, copies + r * features);
    }
    double* strip = triangle;
    for (int64_t r = 0; r < rows; r += kStrip) {
      const int64_t height = std::min(kStrip, rows - r), width = rows - r;
      dot_rows(&at[r], height, &at[r], width, features, strip);
      strip += height * width;
    }
  }
}

template <class T>
double short_gram_task(const Matrix<T>& a, const std::vector<Matrix<T>>& gs, int64_t begin,
                       int64_t end, acc_t<T>* copies) {
  double triangle_a[kMostTriangle], triangle_g[kMostTriangle];
  const int64_t rows = end - begin, used = rows * (rows + kMostStrip) / 2;
  std::fill_n(triangle_a, used, 0.0);
  std::fill_n(triangle_g, used, 0.0);
  token_triangle(triangle_a, a, begin, rows, copies);
  for (const Matrix<T>& g : gs) token_triangle(triangle_g, g, begin, rows, copies);
  double sum = 0;
  for (int64_t r = 0, at = 0; r < rows; r += kStrip) {
    const int64_t height = std::min(kStrip, rows - r), width = rows - r;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j, ++at) {
        sum += (j < height ? 1 : 2) * triangle_a[at] * triangle_g[at];
      }
    }
  }
  return sum;
}

template <class T>
double gradient_task(const Matrix<T>& a, const Matrix<T>& g, int64_t begin, int64_t end,
                     const Tile& tile, acc_t<T>* scratch) {
  gradient_tile(scratch, a, g, begin, end, tile, scratch + kTileOut * kTileIn);
  return dot(scratch, scratch, tile.size());
}

template <class T>
std::vector<double> ghost_norm_kernel(const Tensor& a_tensor, const std::vector<Tensor>& g_tensors,
                                      const std::vector<int64_t>& offsets) {
  const Matrix<T> a = matrix_of<T>(a_tensor);
  std::vector<Matrix<T>> gs;
  int64_t widest = a.cols;
  for (const Tensor& g : g_tensors) {
    gs.push_back(matrix_of<T>(g));
    widest = std::max(widest, gs.back().cols);
  }
  const std::vector<Task> tasks = plan(a, gs, offsets);
  std::vector<double> partial(tasks.size());
  const int64_t features = std::min(kFeatures, widest);
  const int64_t gram_size =
      2 * kMostRowTokens * kColTokens + (kMostRowTokens + kColTokens) * features;
  const int64_t scratch_size = std::max(gram_size, kTileOut * kTileIn + kTileScratch);
  run_tasks<acc_t<T>>(tasks.size(), scratch_size, [&](int64_t i, acc_t<T>* scratch) {
    const Task& task = tasks[i];
    const int64_t begin = offsets[task.segment], end = offsets[task.segment + 1];
    if (task.gram() && end - begin <= kShortTokens) {
      partial[i] = short_gram_task(a, gs, begin, end, scratch);
    } else if (task.gram()) {
      partial[i] = gram_task(a, gs, task.first, end, scratch);
    } else {
      const Matrix<T>& g = gs[task.g];
      const Tile tile = tile_at(task.first, task.second, g.cols, a.cols);
      partial[i] = gradient_task(a, g, begin, end, tile, scratch);
    }
  });
  std::vector<double> out(offsets.size() - 1, 0.0);
  for (size_t i = 0; i < tasks.size(); ++i) out[tasks[i].segment] += partial[i];
  return out;
}

Tensor ghost_norm_of_one_input(const Tensor& a, const std::vector<Tensor>& gs,
                               const Tensor& cu_seqlens) {
  check_dim(kOp, "a", a, 2);
  for (const Tensor& g : gs) {
    check_dim(kOp, "g", g, 2);
    check_shape(kOp, "g", g, {a.size(0), g.size(1)});
    check_dtype(kOp, "g", g, a.scalar_type());
  }
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  return dispatch_dtype(kOp, a.scalar_type(), [&](auto type) {
    return to_result(a, {n_samples}, ghost_norm_kernel<decltype(type)>(a, gs, offsets));
  });
}

Tensor ghost_norm(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens) {
  return ghost_norm_of_one_input(a, {g}, cu_seqlens);
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("ghost_norm", TORCH_BOX(&geffect_fast::ghost_norm));
  m.impl("ghost_norm_of_one_input", TORCH_BOX(&geffect_fast::ghost_norm_of_one_input));
}

// ghost_norm: out[i] = || sum_{t in segment i} g_t a_t^T ||_F^2
// ghost_norm_of_one_input: its sum over several g, of layers that were called with one input
// token_grams: a_s . a_t for all s, t of a segment, (sum of T_i^2); segments of few tokens
// ghost_norm_of_grams: ghost_norm_of_one_input, given token_grams in place of a
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

// Gram form: tokens s and t of a tile. Torch's BLAS computes the elements left of the diagonal too,
// and is given few rows; `packed_gemm` leaves most of them out, and packs fewer times for more
// rows.
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

// Calls f(at, r, c, times) for every element of a triangle: its index, its tokens, and how often
// it counts in a sum over all pairs of tokens.
template <class F>
void each_pair(int64_t rows, const F& f) {
  for (int64_t r = 0, at = 0; r < rows; ++r) {
    const int64_t first = r / kStrip * kStrip;
    for (int64_t c = first; c < rows; ++c, ++at) f(at, r, c, c < first + kStrip ? 1 : 2);
  }
}

// The sum of Gram matrices of tokens [begin, begin + rows) of all of `xs`.
template <class T>
struct Triangle {
  double values[kMostTriangle];

  Triangle(const std::vector<Matrix<T>>& xs, int64_t begin, int64_t rows, acc_t<T>* copies) {
    std::fill_n(values, rows * (rows + kMostStrip) / 2, 0.0);
    for (const Matrix<T>& x : xs) token_triangle(values, x, begin, rows, copies);
  }
};

template <class T>
double short_gram_task(const Matrix<T>& a, const std::vector<Matrix<T>>& gs, int64_t begin,
                       int64_t end, acc_t<T>* copies) {
  const int64_t rows = end - begin;
  const Triangle<T> of_a({a}, begin, rows, copies), of_g(gs, begin, rows, copies);
  double sum = 0;
  each_pair(rows, [&](int64_t at, int64_t, int64_t, int64_t times) {
    sum += times * of_a.values[at] * of_g.values[at];
  });
  return sum;
}

template <class T>
double gradient_task(const Matrix<T>& a, const Matrix<T>& g, int64_t begin, int64_t end,
                     const Tile& tile, acc_t<T>* scratch) {
  gradient_tile(scratch, a, g, begin, end, tile, scratch + kTileOut * kTileIn);
  return dot(scratch, scratch, tile.size());
}

template <class T>
std::vector<Matrix<T>> matrices_of(const std::vector<Tensor>& tensors) {
  std::vector<Matrix<T>> matrices;
  for (const Tensor& tensor : tensors) matrices.push_back(matrix_of<T>(tensor));
  return matrices;
}

template <class T>
int64_t most_columns(const std::vector<Matrix<T>>& xs) {
  int64_t widest = 0;
  for (const Matrix<T>& x : xs) widest = std::max(widest, x.cols);
  return widest;
}

template <class T>
std::vector<double> ghost_norm_kernel(const Tensor& a_tensor, const std::vector<Tensor>& g_tensors,
                                      const std::vector<int64_t>& offsets) {
  const Matrix<T> a = matrix_of<T>(a_tensor);
  const std::vector<Matrix<T>> gs = matrices_of<T>(g_tensors);
  const int64_t widest = std::max(a.cols, most_columns(gs));
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

// Where the Gram matrix of each segment begins among those of all, and where the last one ends.
std::vector<int64_t> gram_offsets(const std::vector<int64_t>& offsets) {
  std::vector<int64_t> at{0};
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    const int64_t tokens = offsets[i + 1] - offsets[i];
    STD_TORCH_CHECK(tokens <= kMostShortTokens, kOp, ": a segment has more than ", kMostShortTokens,
                    " tokens");
    at.push_back(at.back() + tokens * tokens);
  }
  return at;
}

// Calls body(segment, the sum of Gram matrices of its rows of `xs`, as a Triangle) for each.
template <class T, class Body>
void each_triangle(const std::vector<Matrix<T>>& xs, const std::vector<int64_t>& offsets,
                   const Body& body) {
  const int64_t scratch_size = kMostShortTokens * std::min(kFeatures, most_columns(xs));
  run_tasks<acc_t<T>>(offsets.size() - 1, scratch_size, [&](int64_t i, acc_t<T>* copies) {
    body(i, Triangle<T>(xs, offsets[i], offsets[i + 1] - offsets[i], copies));
  });
}

template <class T>
void token_grams_kernel(const Tensor& a, const std::vector<int64_t>& offsets,
                        const std::vector<int64_t>& at, Tensor& out) {
  acc_t<T>* grams = out.mutable_data_ptr<acc_t<T>>();
  each_triangle<T>({matrix_of<T>(a)}, offsets, [&](int64_t i, const Triangle<T>& triangle) {
    acc_t<T>* gram = grams + at[i];
    const int64_t rows = offsets[i + 1] - offsets[i];
    each_pair(rows, [&](int64_t from, int64_t r, int64_t c, int64_t) {
      gram[r * rows + c] = gram[c * rows + r] = static_cast<acc_t<T>>(triangle.values[from]);
    });
  });
}

Tensor token_grams(const Tensor& a, const Tensor& cu_seqlens) {
  check_dim(kOp, "a", a, 2);
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  const std::vector<int64_t> at = gram_offsets(offsets);
  Tensor out = torch::stable::new_empty(a, {at.back()}, acc_dtype(a.scalar_type()));
  dispatch_dtype(kOp, a.scalar_type(), [&](auto type) {
    token_grams_kernel<decltype(type)>(a, offsets, at, out);
    return out;
  });
  return out;
}

template <class T>
std::vector<double> ghost_norm_of_grams_kernel(const Tensor& grams_tensor,
                                               const std::vector<Tensor>& gs,
                                               const std::vector<int64_t>& offsets,
                                               const std::vector<int64_t>& at) {
  const acc_t<T>* grams = grams_tensor.const_data_ptr<acc_t<T>>();
  std::vector<double> out(offsets.size() - 1, 0.0);
  each_triangle<T>(matrices_of<T>(gs), offsets, [&](int64_t i, const Triangle<T>& triangle) {
    const acc_t<T>* gram = grams + at[i];
    const int64_t rows = offsets[i + 1] - offsets[i];
    each_pair(rows, [&](int64_t from, int64_t r, int64_t c, int64_t times) {
      out[i] += times * triangle.values[from] * gram[r * rows + c];
    });
  });
  return out;
}

void check_gradients(const std::vector<Tensor>& gs, int64_t total_tokens, ScalarType dtype) {
  for (const Tensor& g : gs) {
    check_dim(kOp, "g", g, 2);
    check_shape(kOp, "g", g, {total_tokens, g.size(1)});
    check_dtype(kOp, "g", g, dtype);
  }
}

Tensor ghost_norm_of_grams(const Tensor& grams, const std::vector<Tensor>& gs,
                           const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(!gs.empty(), kOp, ": `g` is an empty list");
  const ScalarType dtype = gs.front().scalar_type();
  const int64_t total_tokens = gs.front().size(0);
  check_gradients(gs, total_tokens, dtype);
  const std::vector<int64_t> offsets = read_offsets(kOp, "cu_seqlens", cu_seqlens, total_tokens);
  const std::vector<int64_t> at = gram_offsets(offsets);
  check_shape(kOp, "grams", grams, {at.back()});
  check_dtype(kOp, "grams", grams, acc_dtype(dtype));
  STD_TORCH_CHECK(grams.is_contiguous(), kOp, ": `grams` must be contiguous");
  const int64_t n_samples = static_cast<int64_t>(offsets.size()) - 1;
  return dispatch_dtype(kOp, dtype, [&](auto type) {
    return to_result(grams, {n_samples},
                     ghost_norm_of_grams_kernel<decltype(type)>(grams, gs, offsets, at));
  });
}

Tensor ghost_norm_of_one_input(const Tensor& a, const std::vector<Tensor>& gs,
                               const Tensor& cu_seqlens) {
  check_dim(kOp, "a", a, 2);
  check_gradients(gs, a.size(0), a.scalar_type());
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
  m.impl("token_grams", TORCH_BOX(&geffect_fast::token_grams));
  m.impl("ghost_norm_of_grams", TORCH_BOX(&geffect_fast::ghost_norm_of_grams));
}

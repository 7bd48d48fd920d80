// multi_tensor_gram: out[c, j, k] = sum_{p: groups[p] = c} < grads[j][p], grads[k][p] >
//
// K lists of P same-shaped tensors, flattened list by list -> (n_groups, K, K), symmetric; any
// strides. The elements of a tensor are cut into pieces; a task owns one piece of all K lists and K
// * K sums. It walks the piece in chunks of which all K stay in the second-level cache, so that
// memory is read once for all K (K + 1) / 2 products. Pieces are added in order. Limiter: bytes of
// the gradients.
#include <torch/csrc/stable/library.h>

#include "common/blocks.h"
#include "common/checks.h"
#include "common/tasks.h"
#include "common/tensor_lists.h"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "multi_tensor_gram";
constexpr int64_t kChunk = kDotChunk;       // elements of a list read at once
constexpr int64_t kMinPiece = 16 * kChunk;  // elements of a task
constexpr int64_t kMaxPieces = 1024;        // bounds the memory of the partial sums
constexpr int64_t kBlock = 4;               // rows of the Gram matrix computed together

// Copies elements [begin, begin + n) of the tensor in row-major order of its indices.
template <class T>
void gather_range(const T* data, const Layout& layout, int64_t begin, int64_t n, acc_t<T>* dst) {
  const int64_t dims = layout.sizes.size();
  const int64_t inner = layout.sizes[dims - 1], stride = layout.strides[dims - 1];
  for (int64_t done = 0; done < n;) {
    int64_t rest = (begin + done) / inner, column = (begin + done) % inner,
            offset = column * stride;
    for (int64_t i = dims - 2; i >= 0; --i) {
      offset += rest % layout.sizes[i] * layout.strides[i];
      rest /= layout.sizes[i];
    }
    const int64_t count = std::min(inner - column, n - done);
    gather(data + offset, count, stride, dst + done);
    done += count;
  }
}

// One parameter: K tensors of one shape.
template <class T>
struct Parameter {
  int64_t group, numel;
  bool as_memory;  // all K have the same dense layout
  std::vector<const T*> data;
  std::vector<Layout> layouts;

  Parameter(const std::vector<Tensor>& grads, int64_t n_lists, int64_t index, int64_t n_tensors,
            int64_t group_index)
      : group(group_index), numel(grads[index].numel()) {
    for (int64_t j = 0; j < n_lists; ++j) {
      const Tensor& tensor = grads[j * n_tensors + index];
      data.push_back(static_cast<const T*>(tensor.const_data_ptr()));
      layouts.emplace_back(tensor);
    }
    as_memory = share_dense_layout(layouts);
  }

  // n elements of list j from `begin`; `scratch` holds n.
  const acc_t<T>* chunk(int64_t j, int64_t begin, int64_t n, acc_t<T>* scratch) const {
    if (!as_memory) {
      gather_range(data[j], layouts[j], begin, n, scratch);
      return scratch;
    }
    return dense_row(Matrix<T>{data[j], 1, numel, numel, 1}, 0, begin, n, scratch);
  }
};

// sums (K x K, upper blocks) += the Gram matrix of K rows of n elements.
template <class A>
void add_gram(const std::vector<const A*>& rows, int64_t n, double* sums) {
  const int64_t n_lists = rows.size();
  double block[kBlock * kBlock];
  for (int64_t j = 0; j < n_lists; j += kBlock) {
    const int64_t height = std::min(kBlock, n_lists - j);
    for (int64_t k = j; k < n_lists; k += kBlock) {
      const int64_t width = std::min(kBlock, n_lists - k);
      std::fill(block, block + height * width, 0.0);
      dot_rows(&rows[j], height, &rows[k], width, n, block);
      for (int64_t r = 0; r < height; ++r) {
        for (int64_t c = 0; c < width; ++c) sums[(j + r) * n_lists + k + c] += block[r * width + c];
      }
    }
  }
}

template <class T>
std::vector<double> multi_tensor_gram_kernel(const std::vector<Parameter<T>>& parameters,
                                             int64_t n_lists, int64_t n_groups) {
  using A = acc_t<T>;
  int64_t total = 0;
  for (const Parameter<T>& parameter : parameters) total += parameter.numel;
  const int64_t piece_size = std::max(kMinPiece, ceil_div(total, kMaxPieces));
  std::vector<Piece> pieces;  // `segment` is the parameter
  for (size_t p = 0; p < parameters.size(); ++p) {
    for (int64_t begin = 0; begin < parameters[p].numel; begin += piece_size) {
      pieces.push_back(
          {static_cast<int64_t>(p), begin, std::min(begin + piece_size, parameters[p].numel)});
    }
  }
  const int64_t n_pairs = n_lists * n_lists;
  std::vector<double> partial(pieces.size() * n_pairs, 0.0);
  run_tasks<A>(pieces.size(), n_lists * kChunk, [&](int64_t task, A* scratch) {
    const Parameter<T>& parameter = parameters[pieces[task].segment];
    std::vector<const A*> rows(n_lists);
    for (int64_t at = pieces[task].begin; at < pieces[task].end; at += kChunk) {
      const int64_t n = std::min(kChunk, pieces[task].end - at);
      for (int64_t j = 0; j < n_lists; ++j) {
        rows[j] = parameter.chunk(j, at, n, scratch + j * kChunk);
      }
      add_gram(rows, n, partial.data() + task * n_pairs);
    }
  });
  std::vector<double> out(n_groups * n_pairs, 0.0);
  for (size_t i = 0; i < pieces.size(); ++i) {
    double* sums = out.data() + parameters[pieces[i].segment].group * n_pairs;
    for (int64_t j = 0; j < n_lists; ++j) {
      for (int64_t k = j; k < n_lists; ++k)
        sums[j * n_lists + k] += partial[i * n_pairs + j * n_lists + k];
    }
  }
  for (int64_t c = 0; c < n_groups; ++c) {
    for (int64_t j = 0; j < n_lists; ++j) {
      for (int64_t k = 0; k < j; ++k) {
        out[c * n_pairs + j * n_lists + k] = out[c * n_pairs + k * n_lists + j];
      }
    }
  }
  return out;
}

Tensor multi_tensor_gram(const std::vector<Tensor>& grads, int64_t n_lists,
                         const std::vector<int64_t>& groups, int64_t n_groups) {
  const int64_t n_tensors = groups.size();
  check_tensor_lists(kOp, grads, n_lists, groups, n_groups);
  return dispatch_dtype(kOp, grads[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<Parameter<T>> parameters;
    for (int64_t p = 0; p < n_tensors; ++p) {
      parameters.emplace_back(grads, n_lists, p, n_tensors, groups[p]);
    }
    return to_result(grads[0], {n_groups, n_lists, n_lists},
                     multi_tensor_gram_kernel(parameters, n_lists, n_groups));
  });
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(geffect_fast, CPU, m) {
  m.impl("multi_tensor_gram", TORCH_BOX(&geffect_fast::multi_tensor_gram));
}

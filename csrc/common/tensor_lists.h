// Lists of same-shaped tensors: their checks, and the test that they can be read as memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/checks.h"

namespace geffect_fast {

struct Layout {
  std::vector<int64_t> sizes, strides;

  explicit Layout(const Tensor& tensor) {
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) == 1) continue;
      sizes.push_back(tensor.size(i));
      strides.push_back(tensor.stride(i));
    }
  }
  bool operator==(const Layout& other) const {
    return sizes == other.sizes && strides == other.strides;
  }
  // Every element once and no gaps, in whatever order of dimensions: memory can be read as one row.
  bool is_dense() const {
    std::vector<size_t> order(sizes.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](size_t i, size_t j) { return strides[i] < strides[j]; });
    int64_t expected = 1;
    for (size_t i : order) {
      if (strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
};

// Whether elements with the same index lie at the same place in all of the tensors' memory.
inline bool share_dense_layout(const std::vector<Layout>& layouts) {
  return layouts[0].is_dense() &&
         std::all_of(layouts.begin(), layouts.end(),
                     [&](const Layout& layout) { return layout == layouts[0]; });
}

// `grads` holds n_lists lists of groups.size() tensors, list by list.
inline void check_tensor_lists(const char* op, const std::vector<Tensor>& grads, int64_t n_lists,
                               const std::vector<int64_t>& groups, int64_t n_groups) {
  const int64_t n_tensors = groups.size();
  STD_TORCH_CHECK(
      n_lists > 0 && n_tensors > 0 && static_cast<int64_t>(grads.size()) == n_lists * n_tensors, op,
      ": `grads` must hold n_lists * len(groups) tensors");
  for (int64_t i = 0; i < n_lists * n_tensors; ++i) {
    check_dtype(op, "grads", grads[i], grads[0].scalar_type());
    check_one_device(op, {&grads[0], &grads[i]});
    const Tensor& like = grads[i % n_tensors];
    bool same = grads[i].dim() == like.dim();
    for (int64_t d = 0; same && d < like.dim(); ++d) same = grads[i].size(d) == like.size(d);
    STD_TORCH_CHECK(same, op, ": `grads` must have one shape a parameter in all lists");
  }
  for (int64_t group : groups) {
    STD_TORCH_CHECK(group >= 0 && group < n_groups, op, ": `groups` must lie below n_groups");
  }
}

}  // namespace geffect_fast

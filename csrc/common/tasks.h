// Work in fixed pieces: the pieces never depend on the number of threads, so neither do the sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/dtype.h"

namespace geffect_fast {

// Uninitialised memory on a cache-line boundary, so that BLAS takes the same path on every run.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t elements) {
    const size_t bytes = (std::max<int64_t>(elements, 1) * sizeof(A) + 63) / 64 * 64;
    memory_.reset(static_cast<A*>(std::aligned_alloc(64, bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  A* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };
  std::unique_ptr<A, Free> memory_;
};

#if defined(__linux__)
// Intel's MKL, where torch is built with it: sets the threads of the products this thread asks for,
// 0 for the process's setting; returns the earlier setting.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));
#endif

// While it lives, a product by BLAS stays on the calling thread. MKL splits a sum by the number of
// threads it is allowed even where it gets none, inside a parallel region.
class OneBlasThread {
 public:
#if defined(__linux__)
  OneBlasThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneBlasThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  int before_ = 0;
#else
  OneBlasThread() {}
#endif
};

// Calls body(task, scratch) once for every task; threads fetch the next task when they are free,
// and each has `scratch_elements` of its own. A task must write results that no other task writes.
template <class A, class Body>
void run_tasks(int64_t n_tasks, int64_t scratch_elements, const Body& body) {
  const int64_t workers = std::min<int64_t>(n_tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const OneBlasThread one_blas_thread;
    const Scratch<A> scratch(scratch_elements);
    for (int64_t task = next++; task < n_tasks; task = next++) body(task, scratch.data());
  });
}

// Tokens [begin, end) of one segment.
struct Piece {
  int64_t segment, begin, end;
};

// Cuts every segment into pieces of at most `tokens`, in order.
inline std::vector<Piece> cut_segments(const std::vector<int64_t>& offsets, int64_t tokens) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    for (int64_t begin = offsets[i]; begin < offsets[i + 1]; begin += tokens) {
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(begin + tokens, offsets[i + 1])});
    }
  }
  return pieces;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A new contiguous CPU tensor holding `values`, rounded to the result dtype.
inline Tensor to_result(const Tensor& like, std::initializer_list<int64_t> shape,
                        const std::vector<double>& values) {
  const ScalarType dtype = acc_dtype(like.scalar_type());
  Tensor out = torch::stable::new_empty(like, shape, dtype);
  if (dtype == ScalarType::Double) {
    std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  } else {
    std::transform(values.begin(), values.end(), out.mutable_data_ptr<float>(),
                   [](double value) { return static_cast<float>(value); });
  }
  return out;
}

}  // namespace geffect_fast

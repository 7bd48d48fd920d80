// Sample offsets on the device: read without a wait, safe for any values, and reported when they
// are wrong.
#pragma once

#include "common/checks.h"
#include "cuda/device.cuh"

namespace geffect_fast {

// cu_seqlens of n segments over `total` tokens. A segment never reaches outside [0, total), even
// where the offsets are nonsense.
struct Offsets {
  const void* data;
  bool is_int64;
  int64_t stride, n, total;

  __device__ __forceinline__ int64_t at(int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i * stride]
                    : static_cast<const int32_t*>(data)[i * stride];
  }
  __device__ __forceinline__ int64_t begin(int64_t i) const {
    return max(int64_t{0}, min(at(i), total));
  }
  __device__ __forceinline__ int64_t end(int64_t i) const {
    return max(begin(i), min(at(i + 1), total));
  }
  // Whether segment i is valid: increasing, the first from 0, the last to `total`.
  __device__ __forceinline__ bool is_valid(int64_t i) const {
    const int64_t from = at(i), to = at(i + 1);
    return from >= 0 && from <= to && to <= total && (i > 0 || from == 0) &&
           (i + 1 < n || to == total);
  }
  // The segment that holds `token`, that is, the last i with at(i) <= token; in [0, n).
  __device__ __forceinline__ int64_t segment_of(int64_t token) const {
    int64_t low = 0, high = n;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (at(middle) <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Checks the properties of `cu_seqlens` that the host can see without waiting for the device.
inline Offsets offsets_of(const char* op, const char* name, const Tensor& cu_seqlens,
                          int64_t total_tokens) {
  check_dim(op, name, cu_seqlens, 1);
  const ScalarType dtype = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": `", name,
                  "` must be int32 or int64");
  const int64_t n = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(n >= 0 && (n > 0 || total_tokens == 0), op, ": `", name,
                  "` must run from 0 to total_tokens");
  return {cu_seqlens.const_data_ptr(), dtype == ScalarType::Long, cu_seqlens.stride(0), n,
          total_tokens};
}

// A word of host memory that kernels can write. A kernel that finds wrong offsets stores the number
// of the argument (1 or 2) and gives NaN; the next call of the same op raises. Nothing waits for
// the device.
class OffsetReport {
 public:
  // The word of this op. Raises the error that an earlier call has reported.
  static int* device_word(const char* op, int slot) {
    static int* const words = allocate();
    volatile int* word = words + slot;
    if (const int which = *word; which != 0) {
      *word = 0;
      STD_TORCH_CHECK(false, op, ": `cu_seqlens", which == 2 ? "2" : "",
                      "` of an earlier call decreased or did not run from 0 to total_tokens; its "
                      "results there are NaN");
    }
    return words + slot;
  }

 private:
  static constexpr int kSlots = 64;

  static int* allocate() {
    // A first call may come while a graph is captured, when allocations are refused otherwise.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    void* memory = nullptr;
    STD_CUDA_CHECK(cudaHostAlloc(&memory, kSlots * sizeof(int), cudaHostAllocPortable));
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    int* words = static_cast<int*>(memory);
    std::fill(words, words + kSlots, 0);
    return words;
  }
};

// The word's index of every op with offsets.
enum ReportSlot { kSegmentDot, kSegmentBilinear, kGhostNorm, kGhostDot };

}  // namespace geffect_fast

// The second stage of the ops that leave partial sums, which it adds up over segments, or over
// slices alone.
//
//   segment_sum   out[r, i] = sum_{s} sum_{t in segment i} terms[s, r, t]
//   token_sum     out[r, t] = sum_{s} terms[s, r, t]
//
// terms (slices, rows, total) in fp32, summed in double in an order that only the segments decide.
// A warp owns one (r, i); a long segment is summed by the whole block, whatever the others'
// lengths. Limiter: latency; the terms come from the second-level cache, so a lane loads kAtOnce of
// them, of whatever slices, before it adds the first.
#pragma once

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/offsets.cuh"
#include "cuda/vector.cuh"

namespace geffect_fast {

struct SegmentSum {
  static constexpr int kThreads = 1024;
  static constexpr int kWarps = kThreads / kWarp;
  // Terms of one result from which a block sums faster than a warp.
  static constexpr int64_t kLong = 2048;
  static constexpr int kAtOnce = 16;
};

// This thread's share of row `row` over [begin, end): every `team`-th token from begin + `member`,
// slice by slice.
__device__ __forceinline__ double sum_of_share(const float* terms, int64_t slices,
                                               int64_t slice_stride, int64_t begin, int64_t end,
                                               int member, int team) {
  const int64_t first = begin + member;
  int64_t left = first < end ? slices : 0, t = first;
  double sum = 0;
  while (left > 0) {
    float loaded[SegmentSum::kAtOnce];
#pragma unroll
    for (int u = 0; u < SegmentSum::kAtOnce; ++u) {
      loaded[u] = left > 0 ? terms[t] : 0.f;
      t += team;
      if (t >= end) {
        t = first;
        terms += slice_stride;
        --left;
      }
    }
#pragma unroll
    for (int u = 0; u < SegmentSum::kAtOnce; ++u) sum += loaded[u];
  }
  return sum;
}

// Segments: n of them over `total` terms, with begin(i), end(i), is_valid(i). Result: store(r, i,
// sum). A segment that is not valid gets NaN, and 1 is stored in *report.
template <class Segments, class Result>
__global__ void __launch_bounds__(SegmentSum::kThreads)
    segment_sum_kernel(const float* __restrict__ terms, int64_t slices, int64_t rows,
                       const Segments segments, int* report, const Result result) {
  constexpr int kWarps = SegmentSum::kWarps;
  __shared__ double partial[kWarps];
  __shared__ int is_long[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t n_results = rows * segments.n, slice_stride = rows * segments.total;

  // Neighbouring results go to different blocks, so that few results still fill the device.
  const int64_t step = gridDim.x;
  for (int64_t first = blockIdx.x; first < n_results; first += step * kWarps) {
    const int64_t own = first + warp * step;
    bool own_is_long = false;
    if (own < n_results) {
      const int64_t row = own / segments.n, i = own % segments.n;
      const int64_t begin = segments.begin(i), end = segments.end(i);
      const bool valid = segments.is_valid(i);
      own_is_long = valid && (end - begin) * slices >= SegmentSum::kLong;
      if (!own_is_long) {
        const double sum = valid ? warp_sum(sum_of_share(terms + row * segments.total, slices,
                                                         slice_stride, begin, end, lane, kWarp))
                                 : NAN;
        if (lane == 0) result.store(row, i, sum);
        if (lane == 0 && !valid) {
          *report = 1;
          __threadfence_system();
        }
      }
    }
    if (lane == 0) is_long[warp] = own_is_long;
    __syncthreads();
    for (int other = 0; other < kWarps; ++other) {
      if (!is_long[other]) continue;
      const int64_t shared = first + other * step;
      const int64_t row = shared / segments.n, i = shared % segments.n;
      const double sum = warp_sum(
          sum_of_share(terms + row * segments.total, slices, slice_stride, segments.begin(i),
                       segments.end(i), static_cast<int>(threadIdx.x), SegmentSum::kThreads));
      if (lane == 0) partial[warp] = sum;
      __syncthreads();
      if (warp == 0) {
        const double total = warp_sum(lane < kWarps ? partial[lane] : 0.0);
        if (lane == 0) result.store(row, i, total);
      }
      __syncthreads();
    }
    __syncthreads();  // is_long is written again
  }
}

template <class Term>
__global__ void __launch_bounds__(256)
    token_sum_kernel(const Term* __restrict__ terms, int64_t slices, int64_t size,
                     float* __restrict__ out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < size; at += step) {
    double sum = 0;
#pragma unroll 4
    for (int64_t slice = 0; slice < slices; ++slice) sum += terms[slice * size + at];
    out[at] = static_cast<float>(sum);
  }
}

// Launches segment_sum_kernel for any kind of segments and results.
template <class Segments, class Result>
void launch_segment_sum(const Device& device, const float* terms, int64_t slices, int64_t rows,
                        const Segments& segments, int* report, const Result& result) {
  const int64_t n_results = rows * segments.n;
  if (n_results == 0) return;
  device.launch(segment_sum_kernel<Segments, Result>,
                grid_for(n_results, 2 * device.n_multiprocessors()), dim3(SegmentSum::kThreads), 0,
                terms, slices, rows, segments, report, result);
}

// A row-major (rows, n) matrix.
struct RowMajor {
  float* out;
  int64_t n;

  __device__ __forceinline__ void store(int64_t row, int64_t i, double sum) const {
    out[row * n + i] = static_cast<float>(sum);
  }
};

// terms (slices, rows, offsets.total) -> out (rows, offsets.n). A segment with wrong offsets gets
// NaN, and 1 is stored in *report.
inline void segment_sum(const Device& device, const float* terms, int64_t slices, int64_t rows,
                        const Offsets& offsets, int* report, float* out) {
  launch_segment_sum(device, terms, slices, rows, offsets, report, RowMajor{out, offsets.n});
}

// terms (slices, rows, total) -> out (rows, total).
inline void token_sum(const Device& device, const float* terms, int64_t slices, int64_t rows,
                      int64_t total, float* out) {
  const int64_t size = rows * total;
  if (size == 0) return;
  device.launch(token_sum_kernel<float>,
                grid_for(ceil_div(size, 256), 16 * device.n_multiprocessors()), dim3(256), 0, terms,
                slices, size, out);
}

}  // namespace geffect_fast

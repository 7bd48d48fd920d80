// The parts of token_logprob that read a tile of an lm_head's products, z (tokens, columns) fp32 =
// hidden weight^T for the vocabulary's entries from `first`. With logits x = softcap tanh(scale z /
// softcap), or scale z for softcap 0, c_t = labels[t] - first, and m_t, s_t the maximum and the
// logarithm of the sum over the whole vocabulary:
//
//   token_logprob_rows            out[:, t] = max_v x_tv, sum_v exp(x_tv - max), x_t[c_t] or 0
//   token_logprob_rows_backward   out[t, v] = g_t (1[v = c_t] - exp(x_tv - m_t - s_t)) dx_tv/dz_tv
//
// out (3, tokens) fp32 and (tokens, columns) in the type that the following products read. A label
// outside of the tile has no column: it is compared, never used as an index unchecked. A block owns
// a row and reads it once, a thread 16 bytes at a time, kUnroll of them in flight. Limiter: bytes
// of the tile, from the second-level cache where the caller chooses tiles that fit there.
#include <cfloat>

#include "common/checks.h"
#include "cuda/chunk.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "token_logprob";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;
constexpr int64_t kBlocks = 32;  // at most so many rows a multiprocessor are launched at once

// A (tokens, columns) tile of products and the labels of its tokens.
struct Tile {
  const float* data;
  int64_t n_tokens, n_columns, token_stride, col_stride;
  const int64_t* labels;
  int64_t label_stride, first;
  float scale, softcap;  // before the tanh, if there is one, and after it

  // The label's column; outside of [0, n_columns) where another tile holds it, or none.
  __device__ __forceinline__ int64_t label_column(int64_t token) const {
    return labels[token * label_stride] - first;
  }
};

// kCapped: there is a softcap. kWidth: columns that a thread reads at once.
template <bool kCapped_, int kWidth_>
struct TileTraits {
  static constexpr bool kCapped = kCapped_;
  static constexpr int kWidth = kWidth_;
};

// A logit and the tanh's derivative there.
struct Logit {
  float value, slope;
};

template <bool kCapped>
__device__ __forceinline__ Logit logit(const Tile& tile, float product) {
  const float scaled = product * tile.scale;
  if constexpr (kCapped) {
    const float capped = tanhf(scaled);
    return {tile.softcap * capped, 1.f - capped * capped};
  }
  return {scaled, 1.f};
}

// The chunks first, first + kThreads, ... of a row, all loads issued together. Behind the end the
// first one again.
template <int kWidth>
__device__ __forceinline__ void load_chunks(const float* row, int64_t step, int64_t first,
                                            int64_t n_chunks, float (&out)[kUnroll][kWidth]) {
  Chunk<float, kWidth> chunks[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t chunk = first + u * kThreads;
    chunks[u] = load_chunk<kWidth>(row + (chunk < n_chunks ? chunk : first) * step);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) widen_chunk<float, kWidth>(chunks[u], out[u]);
}

// The sum of exp(x - maximum) over some x. Without any x the maximum is the least finite number,
// which keeps the difference of two maxima from being inf - inf.
struct ExpSum {
  float maximum, sum;

  static __device__ __forceinline__ ExpSum empty() { return {-FLT_MAX, 0.f}; }
  __device__ __forceinline__ void rescale(float to) {
    sum *= expf(maximum - to);
    maximum = to;
  }
  __device__ __forceinline__ void merge(ExpSum other) {
    const float larger = fmaxf(maximum, other.maximum);
    rescale(larger);
    other.rescale(larger);
    sum += other.sum;
  }
};

// The sum over the lanes of a warp, in lane 0 in a fixed order.
__device__ __forceinline__ ExpSum warp_merge(ExpSum own) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    ExpSum other;
    other.maximum = __shfl_down_sync(0xffffffffu, own.maximum, distance);
    other.sum = __shfl_down_sync(0xffffffffu, own.sum, distance);
    own.merge(other);
  }
  return own;
}

// This thread's share of a row.
template <class Traits>
__device__ __forceinline__ ExpSum sum_of_share(const Tile& tile, int64_t token) {
  constexpr int kWidth = Traits::kWidth;
  const float* const row = tile.data + token * tile.token_stride;
  const int64_t n_chunks = tile.n_columns / kWidth, step = kWidth > 1 ? kWidth : tile.col_stride;
  ExpSum own = ExpSum::empty();
  for (int64_t first = threadIdx.x; first < n_chunks; first += kThreads * kUnroll) {
    float x[kUnroll][kWidth];
    load_chunks<kWidth>(row, step, first, n_chunks, x);
    float larger = own.maximum;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        x[u][e] = logit<Traits::kCapped>(tile, x[u][e]).value;
        larger = fmaxf(larger, x[u][e]);  // a repeated chunk changes nothing
      }
    }
    own.rescale(larger);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads >= n_chunks) break;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) own.sum += expf(x[u][e] - larger);
    }
  }
  return own;
}

template <class Traits>
__global__ void __launch_bounds__(kThreads)
    token_logprob_rows_kernel(const Tile tile, float* __restrict__ out) {
  __shared__ ExpSum of_warp[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t token = blockIdx.x; token < tile.n_tokens; token += gridDim.x) {
    const ExpSum of_lanes = warp_merge(sum_of_share<Traits>(tile, token));
    if (lane == 0) of_warp[warp] = of_lanes;
    __syncthreads();
    if (warp == 0) {
      const ExpSum total = warp_merge(lane < kWarps ? of_warp[lane] : ExpSum::empty());
      if (lane == 0) {
        const int64_t column = tile.label_column(token);
        const bool inside = column >= 0 && column < tile.n_columns;
        out[token] = total.maximum;
        out[tile.n_tokens + token] = total.sum;
        out[2 * tile.n_tokens + token] =
            inside ? logit<Traits::kCapped>(
                         tile, tile.data[token * tile.token_stride + column * tile.col_stride])
                         .value
                   : 0.f;
      }
    }
    __syncthreads();  // of_warp is written again
  }
}

// What the derivative needs of a row beside its logits.
struct RowParams {
  const float *maximum, *log_sum, *grad;
  int64_t normaliser_stride, grad_stride;
  float scale;
};

// Elements that are stored at once.
template <class Out, int kWidth>
struct __align__(kWidth * sizeof(Out)) Stored {
  Out elements[kWidth];
};

template <class Traits, class Out>
__global__ void __launch_bounds__(kThreads)
    token_logprob_rows_backward_kernel(const Tile tile, const RowParams rows,
                                       Out* __restrict__ out) {
  constexpr int kWidth = Traits::kWidth;
  const int64_t n_chunks = tile.n_columns / kWidth, step = kWidth > 1 ? kWidth : tile.col_stride;
  for (int64_t token = blockIdx.x; token < tile.n_tokens; token += gridDim.x) {
    const float* const row = tile.data + token * tile.token_stride;
    Out* const out_row = out + token * tile.n_columns;
    const float maximum = rows.maximum[token * rows.normaliser_stride];
    const float log_sum = rows.log_sum[token * rows.normaliser_stride];
    const float scaled = rows.grad[token * rows.grad_stride] * rows.scale;
    const int64_t label = tile.label_column(token);
    for (int64_t first = threadIdx.x; first < n_chunks; first += kThreads * kUnroll) {
      float z[kUnroll][kWidth];
      load_chunks<kWidth>(row, step, first, n_chunks, z);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t column = (first + u * kThreads) * kWidth;
        if (column >= tile.n_columns) break;
        Stored<Out, kWidth> stored;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const Logit x = logit<Traits::kCapped>(tile, z[u][e]);
          const float probability = expf((x.value - maximum) - log_sum);
          const float indicator = label - column == e ? 1.f : 0.f;
          stored.elements[e] = static_cast<Out>(scaled * x.slope * (indicator - probability));
        }
        *reinterpret_cast<Stored<Out, kWidth>*>(out_row + column) = stored;
      }
    }
  }
}

Tile tile_of(const Tensor& product, const Tensor& labels, int64_t first, double scale,
             double softcap) {
  check_dim(kOp, "product", product, 2);
  check_dtype(kOp, "product", product, ScalarType::Float);
  check_shape(kOp, "labels", labels, {product.size(0)});
  check_dtype(kOp, "labels", labels, ScalarType::Long);
  check_one_device(kOp, {&product, &labels});
  return {static_cast<const float*>(product.const_data_ptr()),
          product.size(0),
          product.size(1),
          product.stride(0),
          product.stride(1),
          static_cast<const int64_t*>(labels.const_data_ptr()),
          labels.stride(0),
          first,
          static_cast<float>(softcap == 0 ? scale : scale / softcap),
          static_cast<float>(softcap)};
}

// Calls body with the traits of this tile.
template <class Body>
void dispatch_tile(const Tile& tile, const Body& body) {
  const bool vectors = tile.col_stride == 1 && tile.n_columns % kVector<float> == 0 &&
                       rows_are_aligned(tile.data, tile.token_stride);
  const auto with_width = [&](auto width) {
    if (tile.softcap == 0) return body(TileTraits<false, decltype(width)::value>{});
    return body(TileTraits<true, decltype(width)::value>{});
  };
  if (vectors) return with_width(std::integral_constant<int, kVector<float>>{});
  return with_width(std::integral_constant<int, 1>{});
}

dim3 rows_grid(const Device& device, const Tile& tile) {
  return grid_for(tile.n_tokens, kBlocks * device.n_multiprocessors());
}

Tensor token_logprob_rows(const Tensor& product, const Tensor& labels, int64_t first, double scale,
                          double softcap) {
  const Tile tile = tile_of(product, labels, first, scale, softcap);
  const Device device(product);
  const Tensor out = new_float(product, {3, tile.n_tokens});
  if (tile.n_tokens == 0) return out;
  dispatch_tile(tile, [&](auto traits) {
    device.launch(token_logprob_rows_kernel<decltype(traits)>, rows_grid(device, tile),
                  dim3(kThreads), 0, tile, static_cast<float*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor token_logprob_rows_backward(const Tensor& product, const Tensor& labels, int64_t first,
                                   double scale, double softcap, const Tensor& normaliser,
                                   const Tensor& grad, ScalarType dtype) {
  const Tile tile = tile_of(product, labels, first, scale, softcap);
  check_shape(kOp, "normaliser", normaliser, {2, tile.n_tokens});
  check_dtype(kOp, "normaliser", normaliser, ScalarType::Float);
  check_shape(kOp, "grad", grad, {tile.n_tokens});
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_one_device(kOp, {&product, &normaliser, &grad});
  const Device device(product);
  const Tensor out = torch::stable::new_empty(product, {tile.n_tokens, tile.n_columns}, dtype);
  if (out.numel() == 0) return out;
  const float* const maximum = static_cast<const float*>(normaliser.const_data_ptr());
  const RowParams rows{maximum,
                       maximum + normaliser.stride(0),
                       static_cast<const float*>(grad.const_data_ptr()),
                       normaliser.stride(1),
                       grad.stride(0),
                       static_cast<float>(scale)};
  return dispatch_cuda_dtype(kOp, dtype, [&](auto type) {
    using Out = decltype(type);
    dispatch_tile(tile, [&](auto traits) {
      device.launch(token_logprob_rows_backward_kernel<decltype(traits), Out>,
                    rows_grid(device, tile), dim3(kThreads), 0, tile, rows,
                    static_cast<Out*>(out.mutable_data_ptr()));
    });
    return out;
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(token_logprob_rows)
GEFFECT_FAST_REGISTER_CUDA(token_logprob_rows_backward)

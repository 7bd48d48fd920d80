// segment_dot: out[k, m, i] = sum_{t in segment i} z[m, t] . g[k, t]
//
// z (M, total_tokens, d), g (K, total_tokens, d), cu_seqlens (n + 1) -> (K, M, n) fp32; any
// strides. A warp owns a unit: one token's slice of a row, in all K + M rows. A lane reads 16 bytes
// of every row at once and keeps kKTile x kMTile sums; the warp's sums are one term of (slice, k,
// m, token), and segment_sum adds the terms. More than 8 x 4 products take several passes over the
// unit, which by then lies in a cache. Limiter: bytes of z and g, each read once.
#include "cuda/chunk.cuh"
#include "cuda/device.cuh"
#include "cuda/segment_sum.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_dot";

// kVectors: 16 bytes a lane and row; else one element, for rows that are strided or not aligned.
template <class T_, int kKTile_, int kMTile_, bool kVectors>
struct DotTraits {
  using T = T_;
  static constexpr int kKTile = kKTile_, kMTile = kMTile_, kSums = kKTile * kMTile;
  static constexpr int kWidth = kVectors ? kVector<T> : 1;
  static constexpr int kThreads = 128;
  // Blocks of a multiprocessor, hence at most 80, 128 or 168 registers.
  static constexpr int kBlocks = kSums <= 2 ? 6 : kSums <= 8 ? 4 : 3;
  // Steps whose loads are issued together.
  static constexpr int kUnroll = ceil_div(kLoadsAtOnce, kKTile + kMTile);
  // Steps of a warp over a slice: 4 KiB of every row.
  static constexpr int kSteps = 4096 / (kWarp * kWidth * sizeof(T));
};

constexpr int64_t kWaves = 8;  // of blocks, so many that the device is full until the end

// A (count, total_tokens, d) tensor.
template <class T>
struct Rows {
  const T* data;
  int64_t count, stride, token_stride, col_stride;

  explicit Rows(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())),
        count(tensor.size(0)),
        stride(tensor.stride(0)),
        token_stride(tensor.stride(1)),
        col_stride(tensor.stride(2)) {}

  __device__ __forceinline__ const T* at(int64_t index, int64_t token, int64_t col) const {
    return data + index * stride + token * token_stride + col * col_stride;
  }
  bool vectorised() const {
    return col_stride == 1 && rows_are_aligned(data, stride) &&
           rows_are_aligned(data, token_stride);
  }
};

// A row holds chunks of kWidth elements.
template <class T>
struct DotParams {
  Rows<T> z, g;
  int64_t total, d;
  int slice_chunks;  // block x owns chunks [x * slice_chunks, (x + 1) * slice_chunks)
  float* terms;      // (slices, K, M, total)
};

// sums[k * kMTile + m] += this lane's part of g[k0 + k] . z[m0 + m] over `chunks` chunks of
// `token`'s rows from element `col`. Rows beyond the last repeat it; their sums are not read.
template <class Traits, int kWidth, int kUnroll>
__device__ __forceinline__ void add_products(const DotParams<typename Traits::T>& p, int64_t token,
                                             int64_t k0, int64_t m0, int64_t col, int chunks,
                                             float (&sums)[Traits::kSums]) {
  using T = typename Traits::T;
  constexpr int kKTile = Traits::kKTile, kMTile = Traits::kMTile;
  const T* const z_rows = p.z.at(m0, token, col);
  const T* const g_rows = p.g.at(k0, token, col);
  const int64_t z_step = Traits::kWidth > 1 ? kWidth : p.z.col_stride;
  const int64_t g_step = Traits::kWidth > 1 ? kWidth : p.g.col_stride;
#pragma unroll 1
  for (int first = 0; first < chunks; first += kWarp * kUnroll) {
    Chunk<T, kWidth> z_chunks[kUnroll][kMTile], g_chunks[kUnroll][kKTile];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int chunk = first + u * kWarp + threadIdx.x % kWarp;
      if (chunk < chunks) {
        // One pointer that steps from row to row: a pointer a row would not fit the registers.
        const T* z_row = z_rows + chunk * z_step;
#pragma unroll
        for (int m = 0; m < kMTile; ++m) {
          z_chunks[u][m] = load_chunk<kWidth>(z_row);
          if (m0 + m + 1 < p.z.count) z_row += p.z.stride;
        }
        const T* g_row = g_rows + chunk * g_step;
#pragma unroll
        for (int k = 0; k < kKTile; ++k) {
          g_chunks[u][k] = load_chunk<kWidth>(g_row);
          if (k0 + k + 1 < p.g.count) g_row += p.g.stride;
        }
      } else {
#pragma unroll
        for (int m = 0; m < kMTile; ++m) z_chunks[u][m] = Chunk<T, kWidth>{};
#pragma unroll
        for (int k = 0; k < kKTile; ++k) g_chunks[u][k] = Chunk<T, kWidth>{};
      }
    }
    __syncwarp();  // keeps the compiler from using a load before it has issued the others
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float z[kMTile][kWidth];
#pragma unroll
      for (int m = 0; m < kMTile; ++m) widen_chunk<T, kWidth>(z_chunks[u][m], z[m]);
#pragma unroll
      for (int k = 0; k < kKTile; ++k) {
        float g[kWidth];
        widen_chunk<T, kWidth>(g_chunks[u][k], g);
#pragma unroll
        for (int m = 0; m < kMTile; ++m) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            sums[k * kMTile + m] = fmaf(g[e], z[m][e], sums[k * kMTile + m]);
          }
        }
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    segment_dot_kernel(const DotParams<typename Traits::T> p) {
  constexpr int kWidth = Traits::kWidth, kLanesOfSum = kWarp / Traits::kSums;
  constexpr int kWarps = Traits::kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t slice = blockIdx.x, n_chunks = p.d / kWidth, begin = slice * p.slice_chunks;
  const int chunks = static_cast<int>(min(n_chunks - begin, int64_t{p.slice_chunks}));
  // The rest of a row after its last 16 bytes.
  const int tail = kWidth > 1 && blockIdx.x + 1 == gridDim.x ? static_cast<int>(p.d % kWidth) : 0;
  for (int64_t token = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarp; token < p.total;
       token += int64_t{gridDim.y} * kWarps) {
    for (int64_t k0 = 0; k0 < p.g.count; k0 += Traits::kKTile) {
      for (int64_t m0 = 0; m0 < p.z.count; m0 += Traits::kMTile) {
        float sums[Traits::kSums] = {};
        add_products<Traits, kWidth, Traits::kUnroll>(p, token, k0, m0, begin * kWidth, chunks,
                                                      sums);
        if (tail > 0) {
          add_products<Traits, 1, 1>(p, token, k0, m0, n_chunks * kWidth, tail, sums);
        }
        const float sum = warp_sum_each(sums);
        const int64_t k = k0 + lane / kLanesOfSum / Traits::kMTile;
        const int64_t m = m0 + lane / kLanesOfSum % Traits::kMTile;
        if (lane % kLanesOfSum == 0 && k < p.g.count && m < p.z.count) {
          p.terms[((slice * p.g.count + k) * p.z.count + m) * p.total + token] = sum;
        }
      }
    }
  }
}

template <class Traits>
void launch_segment_dot(const Device& device, const Tensor& z, const Tensor& g,
                        const Offsets& offsets, int* report, float* out) {
  using T = typename Traits::T;
  const int64_t d = z.size(2), total = z.size(1), pairs = g.size(0) * z.size(0);
  const int64_t steps = ceil_div(d / Traits::kWidth, kWarp);
  const int64_t slices = std::max<int64_t>(1, ceil_div(steps, Traits::kSteps));
  const Tensor terms = new_float(z, {slices, pairs, total});
  float* terms_data = static_cast<float*>(terms.mutable_data_ptr());
  if (total > 0) {
    const DotParams<T> params{
        Rows<T>(z), Rows<T>(g), total, d, static_cast<int>(ceil_div(steps, slices)) * kWarp,
        terms_data};
    const int64_t limit = ceil_div(kWaves * Traits::kBlocks * device.n_multiprocessors(), slices);
    dim3 grid = grid_for(slices, slices);
    grid.y = grid_for(ceil_div(total, Traits::kThreads / kWarp), limit).x;
    device.launch(segment_dot_kernel<Traits>, grid, dim3(Traits::kThreads), 0, params);
  }
  segment_sum(device, terms_data, slices, pairs, offsets, report, out);
}

// Calls body with the smallest tiles that hold K x M products, or the largest.
template <class T, class Body>
void dispatch_tiles(int64_t n_g, int64_t n_z, const Body& body) {
  const auto with_g = [&](auto m_tile) {
    constexpr int kMTile = decltype(m_tile)::value;
    if (n_g == 1) return body(DotTraits<T, 1, kMTile, true>{});
    if (n_g == 2) return body(DotTraits<T, 2, kMTile, true>{});
    if (n_g <= 4) return body(DotTraits<T, 4, kMTile, true>{});
    return body(DotTraits<T, 8, kMTile, true>{});
  };
  if (n_z == 1) return with_g(std::integral_constant<int, 1>{});
  if (n_z == 2) return with_g(std::integral_constant<int, 2>{});
  return with_g(std::integral_constant<int, 4>{});
}

Tensor segment_dot(const Tensor& z, const Tensor& g, const Tensor& cu_seqlens) {
  check_dim(kOp, "z", z, 3);
  check_dim(kOp, "g", g, 3);
  check_shape(kOp, "g", g, {g.size(0), z.size(1), z.size(2)});
  check_dtype(kOp, "g", g, z.scalar_type());
  const Offsets offsets = offsets_of(kOp, "cu_seqlens", cu_seqlens, z.size(1));
  check_one_device(kOp, {&z, &g, &cu_seqlens});
  const Device device(z);
  int* const report = OffsetReport::device_word(kOp, kSegmentDot);
  const Tensor out = new_float(z, {g.size(0), z.size(0), offsets.n});
  if (out.numel() == 0) return out;
  float* const result = static_cast<float*>(out.mutable_data_ptr());
  return dispatch_cuda_dtype(kOp, z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto traits) {
      launch_segment_dot<decltype(traits)>(device, z, g, offsets, report, result);
    };
    if (Rows<T>(z).vectorised() && Rows<T>(g).vectorised()) {
      dispatch_tiles<T>(g.size(0), z.size(0), launch);
    } else {
      launch(DotTraits<T, 4, 4, false>{});
    }
    return out;
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(segment_dot)

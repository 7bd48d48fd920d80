// ghost_dot: out[i, j] = < sum_{s in segment i} g_s a_s^T, sum_{t in segment2 j} g2_t a2_t^T >_F
//
// a (T, d_in), g (T, d_out), cu_seqlens (N + 1), a2 (T2, d_in), g2 (T2, d_out), cu_seqlens2
// (N2 + 1) -> (N, N2) fp32; any strides.
//
//   sum_{s,t} (a_s . a2_t)(g_s . g2_t)        T T2 (d_in + d_out) multiply-adds
//
// A block owns a tile of token pairs (a warp a part of it), multiplies both Grams in registers and
// sums the products by pairs of segments in shared memory. One partial sum for each pair of
// segments that meets a tile goes to slot (row tile + i, column tile + j): both indices only grow
// along the tokens, so a slot has one writer. Memory: (T / tile + N) (T2 / tile + N2) partial sums.
// Limiter: arithmetic.
#include <array>

#include "cuda/choose.h"
#include "cuda/gram_tiling.h"
#include "cuda/offsets.cuh"
#include "cuda/pair_sums.h"
#include "cuda/tile_product.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_dot";

template <class T>
struct Side {
  Operand<T> a, g;
  Offsets offsets;

  __host__ __device__ int64_t tiles() const { return ceil_div(a.rows, kTileSide<T>); }
  // Slots along this side: one for every segment in every tile that it meets, and a few unused.
  __host__ __device__ int64_t slots() const { return tiles() + offsets.n; }
};

// segments[r] = the segment of the tile's row r, -1 behind the last token.
__device__ __forceinline__ void find_segments(const Offsets& offsets, int64_t first, int count,
                                              int* segments) {
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t token = first + r;
    segments[r] = token < offsets.total ? static_cast<int>(offsets.segment_of(token)) : -1;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    pairs_kernel(Side<typename Traits::T> x, Side<typename Traits::T> y, float* partial) {
  constexpr int kM = Traits::kM, kN = Traits::kN, kPitch = kN + 1;  // no two rows in a bank
  static_assert(kM * kPitch * sizeof(float) <= Traits::kSharedBytes && kM <= Traits::kThreads);
  __shared__ int x_segments[kM], y_segments[kN], sum_segments[kM];
  __shared__ int n_sums;
  unsigned char* shared = dynamic_shared();
  float* products = reinterpret_cast<float*>(shared);
  const int64_t y_tiles = y.tiles(), y_slots = y.slots(), n_tiles = x.tiles() * y_tiles;
  for (int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const int64_t x_tile = tile / y_tiles, y_tile = tile % y_tiles;
    const int64_t s = x_tile * kM, t = y_tile * kN;
    Accumulator<Traits> of_a, of_g;
    TilePipeline<Traits, Contract::kFeatures>(shared).multiply(
        {x.a, y.a, s, x.a.rows, t, y.a.rows, 0, x.a.cols, false}, of_a,
        {x.g, y.g, s, x.g.rows, t, y.g.rows, 0, x.g.cols, false}, of_g);
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          products[Accumulator<Traits>::row(i, e) * kPitch + Accumulator<Traits>::col(j, e)] =
              of_a.part[i][j][e] * of_g.part[i][j][e];
        }
      }
    }
    find_segments(x.offsets, s, kM, x_segments);
    find_segments(y.offsets, t, kN, y_segments);
    __syncthreads();
    // Down the columns: row r of segment i is added to the row where the sum of i is kept, which is
    // never below r.
    if (threadIdx.x < kN) {
      int kept = -1, segment = -1;
      float sum = 0.f;
      for (int r = 0; r < kM && x_segments[r] >= 0; ++r) {
        if (x_segments[r] != segment) {
          if (kept >= 0) products[kept * kPitch + threadIdx.x] = sum;
          segment = x_segments[r];
          ++kept;
          sum = 0.f;
          if (threadIdx.x == 0) sum_segments[kept] = segment;
        }
        sum += products[r * kPitch + threadIdx.x];
      }
      products[kept * kPitch + threadIdx.x] = sum;
      if (threadIdx.x == 0) n_sums = kept + 1;
    }
    __syncthreads();
    // Along the rows that are left.
    if (static_cast<int>(threadIdx.x) < n_sums) {
      float* to = partial + (x_tile + sum_segments[threadIdx.x]) * y_slots + y_tile;
      float sum = 0.f;
      int segment = y_segments[0];
      for (int c = 0; c < kN && y_segments[c] >= 0; ++c) {
        if (y_segments[c] != segment) {
          to[segment] = sum;
          segment = y_segments[c];
          sum = 0.f;
        }
        sum += products[threadIdx.x * kPitch + c];
      }
      to[segment] = sum;
    }
    __syncthreads();  // the next tile's copies overwrite the products
  }
}

// The segment of every token, for both sides.
__global__ void token_segments_kernel(Offsets offsets, Offsets offsets2, int32_t* segments,
                                      int32_t* segments2) {
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < offsets.total + offsets2.total; index += int64_t{gridDim.x} * blockDim.x) {
    if (index < offsets.total) {
      segments[index] = static_cast<int32_t>(offsets.segment_of(index));
    } else {
      const int64_t token = index - offsets.total;
      segments2[token] = static_cast<int32_t>(offsets2.segment_of(token));
    }
  }
}

// Tiles of partial sums: slot (row tile + i, column tile + j) for segments i and j.
struct PartialSums {
  const float* data;
  int64_t width, rows, cols;  // of a row of slots; of a tile
};

// A warp owns one result: the sum of its slots.
__global__ void collect_pairs_kernel(Offsets x, Offsets y, PartialSums partial, float* out) {
  const int64_t n_results = x.n * y.n, warps = int64_t{gridDim.x} * blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t result = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
       result < n_results; result += warps) {
    const int64_t i = result / y.n, j = result % y.n;
    const int64_t s = x.begin(i), s_end = x.end(i), t = y.begin(j), t_end = y.end(j);
    double sum = 0;
    if (s < s_end && t < t_end) {
      const int64_t row = s / partial.rows, col = t / partial.cols;
      const int64_t tall = (s_end - 1) / partial.rows - row + 1;
      const int64_t wide = (t_end - 1) / partial.cols - col + 1;
      const float* from = partial.data + (row + i) * partial.width + col + j;
      for (int64_t at = lane; at < tall * wide; at += kWarp) {
        sum += from[at / wide * partial.width + at % wide];
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) out[result] = static_cast<float>(sum);
  }
}

// NaN in the rows and columns of segments whose offsets are wrong; a thread owns a segment of each
// side.
__global__ void check_kernel(Offsets offsets, Offsets offsets2, int* report, float* out) {
  const float nan = __uint_as_float(0x7fc00000u);
  const int64_t n = max(offsets.n, offsets2.n);
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; index < n;
       index += int64_t{gridDim.x} * blockDim.x) {
    if (index < offsets.n && !offsets.is_valid(index)) {
      *report = 1;
      for (int64_t j = 0; j < offsets2.n; ++j) out[index * offsets2.n + j] = nan;
    }
    if (index < offsets2.n && !offsets2.is_valid(index)) {
      *report = 2;
      for (int64_t i = 0; i < offsets.n; ++i) out[i * offsets2.n + index] = nan;
    }
  }
  __threadfence_system();
}

constexpr int kCollectThreads = 128;

// What ghost_dot_pairs_sm90 gives, see there; of first size 0 where it is not built.
Tensor hopper_pairs(const Device& device, const Tensor& a, const Tensor& g, const Offsets& offsets,
                    const Tensor& a2, const Tensor& g2, const Offsets& offsets2) {
  using torch::stable::detail::from;
  const GramTiling tiling =
      pair_tiling(offsets.total, offsets2.total, a.size(1), g.size(1), device.n_multiprocessors());
  const Tensor segments = torch::stable::new_empty(a, {offsets.total}, ScalarType::Int);
  const Tensor segments2 = torch::stable::new_empty(a, {offsets2.total}, ScalarType::Int);
  device.launch(token_segments_kernel,
                device.grid_for_tiles(ceil_div(offsets.total + offsets2.total, kCollectThreads)),
                dim3(kCollectThreads), 0, offsets, offsets2, segments.mutable_data_ptr<int32_t>(),
                segments2.mutable_data_ptr<int32_t>());
  std::array<StableIValue, 12> stack{from(a),
                                     from(g),
                                     from(segments),
                                     from(a2),
                                     from(g2),
                                     from(segments2),
                                     from(offsets.n),
                                     from(offsets2.n),
                                     from(tiling.tile),
                                     from(tiling.parts),
                                     from(tiling.a_parts),
                                     from(tiling.stages)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(GEFFECT_FAST_OP("ghost_dot_pairs_sm90"), "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor ghost_dot(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens, const Tensor& a2,
                 const Tensor& g2, const Tensor& cu_seqlens2) {
  for (const Tensor* tensor : {&a, &g, &a2, &g2}) {
    check_dim(kOp, "a, g, a2, g2", *tensor, 2);
    check_dtype(kOp, "a, g, a2, g2", *tensor, a.scalar_type());
  }
  check_shape(kOp, "g", g, {a.size(0), g.size(1)});
  check_shape(kOp, "a2", a2, {a2.size(0), a.size(1)});
  check_shape(kOp, "g2", g2, {a2.size(0), g.size(1)});
  check_one_device(kOp, {&a, &g, &cu_seqlens, &a2, &g2, &cu_seqlens2});
  const Device device(a);
  const Offsets offsets = offsets_of(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  const Offsets offsets2 = offsets_of(kOp, "cu_seqlens2", cu_seqlens2, a2.size(0));
  int* report = OffsetReport::device_word(kOp, kGhostDot);
  return dispatch_cuda_dtype(kOp, a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Tensor out = new_float(a, {offsets.n, offsets2.n});
    if (offsets.n == 0 || offsets2.n == 0) return out;
    const OperandHolder<T> a_held(a), g_held(g), a2_held(a2), g2_held(g2);
    const Side<T> x{a_held.operand(), g_held.operand(), offsets};
    const Side<T> y{a2_held.operand(), g2_held.operand(), offsets2};
    const bool empty = a.numel() == 0 || g.numel() == 0 || a2.numel() == 0;
    const bool by_clusters = kTensorCores<T> && device.has_warpgroups() && !empty &&
                             ghost_form() == GhostForm::kClusters;
    Tensor partial = out;
    PartialSums sums{nullptr, 0, kSumRows, kSumCols};
    if (by_clusters) {
      partial = hopper_pairs(device, a_held.tensor(), g_held.tensor(), offsets, a2_held.tensor(),
                             g2_held.tensor(), offsets2);
      STD_TORCH_CHECK(partial.size(0) > 0, kOp, ": this build has no kernels for clusters");
    } else {
      partial = new_float(a, {x.slots(), y.slots()});
      sums.rows = sums.cols = kTileSide<T>;
      with_tile<T, HopperTile>(device, [&](auto tile) {
        using Traits = decltype(tile);
        device.launch(pairs_kernel<Traits>, device.grid_for_tiles(x.tiles() * y.tiles()),
                      dim3(Traits::kThreads), Traits::kSharedBytes, x, y,
                      partial.template mutable_data_ptr<float>());
      });
    }
    sums.data = partial.const_data_ptr<float>();
    sums.width = partial.size(1);
    device.launch(collect_pairs_kernel,
                  device.grid_for_tiles(ceil_div(offsets.n * offsets2.n, kCollectThreads / kWarp)),
                  dim3(kCollectThreads), 0, offsets, offsets2, sums, out.mutable_data_ptr<float>());
    device.launch(check_kernel,
                  device.grid_for_tiles(ceil_div(std::max(offsets.n, offsets2.n), kCollectThreads)),
                  dim3(kCollectThreads), 0, offsets, offsets2, report,
                  out.mutable_data_ptr<float>());
    return out;
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(ghost_dot)

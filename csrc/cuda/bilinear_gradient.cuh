// segment_bilinear for several directions, from one product: with D_i = G_i^T A_i, the gradient of
// segment i,
//
//   out[m, i] = < D_i, V_m >
//
// costs T d_in d_out multiply-adds for two directions together, where A V_m^T costs as much for
// each. A block owns a tile of the layer (d_out x d_in) and a range of segments. It keeps the tile
// of two directions in registers, read once; for one segment after another it makes the gradient's
// tile in registers and adds its products with both. Limiter: arithmetic; segments shorter than a
// slab of tokens pay for a whole one.
#pragma once

#include "cuda/segment_sum.cuh"
#include "cuda/tile_product.cuh"

namespace geffect_fast {

// Directions whose tiles a block keeps.
inline constexpr int kSharedDirections = 2;

// Elements `col` and `col + 1` of a row that begins on 16 bytes, as they are; 0 from n_cols on.
template <class T>
__device__ __forceinline__ uint32_t load_raw_pair(const T* row, int64_t col, int64_t n_cols) {
  static_assert(sizeof(T) == 2);
  if (col + 1 < n_cols) return *reinterpret_cast<const uint32_t*>(row + col);
  return col < n_cols ? row[col].x : 0u;
}

template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  } else {
    Half low, high;
    low.x = static_cast<unsigned short>(pair & 0xffffu);
    high.x = static_cast<unsigned short>(pair >> 16);
    return make_float2(static_cast<float>(low), static_cast<float>(high));
  }
}

// products[direction][segment][tile] for n_directions (at most kSharedDirections) of v, which are
// v_stride apart.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    bilinear_gradient_kernel(Operand<typename Traits::T> a, Operand<typename Traits::T> g,
                             Operand<typename Traits::T> v, int64_t v_stride, int n_directions,
                             Offsets offsets, int64_t n_ranges, float* products) {
  using T = typename Traits::T;
  constexpr int kWarps = Traits::kThreads / kWarp;
  __shared__ float warp_sums[kSharedDirections][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t in_tiles = ceil_div(a.cols, Traits::kN);
  const int64_t n_tiles = in_tiles * ceil_div(g.cols, Traits::kM);
  const int64_t tile = blockIdx.x % n_tiles, range = blockIdx.x / n_tiles;
  const int64_t out = tile / in_tiles * Traits::kM, in = tile % in_tiles * Traits::kN;

  uint32_t directions[kSharedDirections][Traits::kRowTiles][Traits::kColTiles][2];
#pragma unroll
  for (int m = 0; m < kSharedDirections; ++m) {
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = out + Accumulator<Traits>::row(i, 2 * half);
        const bool there = m < n_directions && row < v.rows;
        const T* from = v.data + (there ? m * v_stride + row * v.row_stride : 0);
#pragma unroll
        for (int j = 0; j < Traits::kColTiles; ++j) {
          const int64_t col = in + Accumulator<Traits>::col(j, 0);
          directions[m][i][j][half] = there ? load_raw_pair(from, col, v.cols) : 0u;
        }
      }
    }
  }

  const int64_t last = offsets.n * (range + 1) / n_ranges;
  for (int64_t segment = offsets.n * range / n_ranges; segment < last; ++segment) {
    Accumulator<Traits> gradient;
    TilePipeline<Traits, Contract::kTokens>(dynamic_shared())
        .multiply(
            {g, a, out, g.cols, in, a.cols, offsets.begin(segment), offsets.end(segment), false},
            gradient);
#pragma unroll
    for (int m = 0; m < kSharedDirections; ++m) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < Traits::kColTiles; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 pair = widen_pair<T>(directions[m][i][j][half]);
            sum = fmaf(gradient.part[i][j][2 * half], pair.x, sum);
            sum = fmaf(gradient.part[i][j][2 * half + 1], pair.y, sum);
          }
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) warp_sums[m][warp] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n_directions) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[threadIdx.x][w];
      products[(threadIdx.x * offsets.n + segment) * n_tiles + tile] = sum;
    }
    // The next segment's barriers keep its sums from overwriting these.
  }
}

// The products of a segment, one a tile, as the terms that launch_segment_sum adds.
struct TileTerms {
  Offsets offsets;
  int64_t n_tiles, n, total;

  TileTerms(const Offsets& of, int64_t tiles)
      : offsets(of), n_tiles(tiles), n(of.n), total(of.n * tiles) {}
  __device__ __forceinline__ int64_t begin(int64_t i) const { return i * n_tiles; }
  __device__ __forceinline__ int64_t end(int64_t i) const { return (i + 1) * n_tiles; }
  __device__ __forceinline__ bool is_valid(int64_t i) const { return offsets.is_valid(i); }
};

// out (M, n) for the M directions of v (rows of each, v_stride apart).
template <class T>
void bilinear_by_gradients(const Device& device, const Operand<T>& a, const Operand<T>& g,
                           const Operand<T>& v, int64_t n_directions, int64_t v_stride,
                           const Offsets& offsets, int* report, const Tensor& out) {
  const int64_t n_tiles = ceil_div(g.cols, kTileSide<T>) * ceil_div(a.cols, kTileSide<T>);
  // Blocks of all multiprocessors, a few times over; a range is one segment or more.
  const int64_t n_ranges = std::clamp<int64_t>(ceil_div(4 * device.n_multiprocessors(), n_tiles), 1,
                                               std::max<int64_t>(offsets.n, 1));
  const Tensor products = new_float(out, {n_directions, offsets.n, n_tiles});
  float* to = products.mutable_data_ptr<float>();
  with_tile<T, HopperTile>(device, [&](auto tile) {
    using Traits = decltype(tile);
    for (int64_t m = 0; m < n_directions; m += kSharedDirections) {
      Operand<T> first = v;
      first.data += m * v_stride;
      const int count = static_cast<int>(std::min<int64_t>(kSharedDirections, n_directions - m));
      device.launch(bilinear_gradient_kernel<Traits>,
                    dim3(static_cast<unsigned>(n_tiles * n_ranges)), dim3(Traits::kThreads),
                    Traits::kSharedBytes, a, g, first, v_stride, count, offsets, n_ranges,
                    to + m * offsets.n * n_tiles);
    }
  });
  launch_segment_sum(device, products.const_data_ptr<float>(), 1, n_directions,
                     TileTerms(offsets, n_tiles), report,
                     RowMajor{out.mutable_data_ptr<float>(), offsets.n});
}

}  // namespace geffect_fast

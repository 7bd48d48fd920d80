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
#include "cuda/offsets.cuh"
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

// A thread owns one result: the sum of its slots.
template <class T>
__global__ void collect_pairs_kernel(Side<T> x, Side<T> y, const float* partial, float* out) {
  constexpr int kTile = kTileSide<T>;
  const int64_t n_results = x.offsets.n * y.offsets.n, y_slots = y.slots();
  for (int64_t result = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; result < n_results;
       result += int64_t{gridDim.x} * blockDim.x) {
    const int64_t i = result / y.offsets.n, j = result % y.offsets.n;
    const int64_t s = x.offsets.begin(i), s_end = x.offsets.end(i);
    const int64_t t = y.offsets.begin(j), t_end = y.offsets.end(j);
    double sum = 0;
    for (int64_t row = s / kTile; s < s_end && row <= (s_end - 1) / kTile; ++row) {
      for (int64_t col = t / kTile; t < t_end && col <= (t_end - 1) / kTile; ++col) {
        sum += partial[(row + i) * y_slots + col + j];
      }
    }
    out[result] = static_cast<float>(sum);
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
    const Tensor partial = new_float(a, {x.slots(), y.slots()});
    with_tile<T, HopperTile>(device, [&](auto tile) {
      using Traits = decltype(tile);
      device.launch(pairs_kernel<Traits>, device.grid_for_tiles(x.tiles() * y.tiles()),
                    dim3(Traits::kThreads), Traits::kSharedBytes, x, y,
                    partial.mutable_data_ptr<float>());
    });
    device.launch(collect_pairs_kernel<T>,
                  device.grid_for_tiles(ceil_div(offsets.n * offsets2.n, kCollectThreads)),
                  dim3(kCollectThreads), 0, x, y, partial.const_data_ptr<float>(),
                  out.mutable_data_ptr<float>());
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

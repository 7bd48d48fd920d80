// ghost_dot_pairs_sm90: the sums of ghost_dot by gram_tiles_sm90.cuh.
//
// (a_s . a2_t)(g_s . g2_t), summed over tiles of kSumRows x kSumCols pairs of tokens by pairs of
// segments (i, j), of which the caller has written each token's to `segments`, `segments2` (int32):
//
//   partial (T / kSumRows + n, T2 / kSumCols + n2) fp32, at (row tile + i, column tile + j)
//
// Both indices only grow along the tokens, so a slot has one writer. Limiter: arithmetic.
#include "common/checks.h"
#include "cuda/gram_tiles_sm90.cuh"
#include "cuda/pair_sums.h"

namespace geffect_fast {
namespace {

struct PairParams {
  const int32_t *segments, *segments2;
  int rows, cols, d_in, d_out;
  GramCut cut;
  float* partial;
  int64_t width;  // of partial
};

constexpr int kTileRows = 4;  // tiles of rows whose tokens are used together

// Every `step`-th tile from `number` on; neighbours share tokens of both sides.
template <class Traits>
struct PairTasks {
  const PairParams& p;
  int64_t number, step;

  __device__ __forceinline__ GramTask operator()() {
    const int64_t x_tiles = ceil_div(p.rows, Traits::kN), y_tiles = ceil_div(p.cols, Traits::kN);
    GramTask task{};
    if (number >= x_tiles * y_tiles) {
      task.stop = true;
      return task;
    }
    const int64_t in_group = kTileRows * y_tiles, first = number / in_group * kTileRows;
    const int64_t tall = min(int64_t{kTileRows}, x_tiles - first), rest = number % in_group;
    task.row = static_cast<int>((first + rest % tall) * Traits::kN);
    task.col = static_cast<int>(rest / tall * Traits::kN);
    task.row_end = p.rows;
    task.col_end = p.cols;
    number += step;
    return task;
  }
};

// Sums a warp's 16 rows by pairs of segments.
struct PairSink {
  const PairParams& p;

  __device__ __forceinline__ void begin(const GramTask&) {}
  __device__ __forceinline__ void end() {}

  // A row of kSumCols sums of x segment i, four neighbouring columns a lane, whose segments `of`
  // holds (-1 behind the last token): added up by segment and written to `row` of partial.
  __device__ __forceinline__ void store_row(const float (&sums)[4], const int (&of)[4],
                                            float* row) const {
    const int lane = threadIdx.x % kWarp;
    // Runs of one segment: that of the first column, that of the last, and those between, which lie
    // within the lane.
    float head = sums[0], run = sums[0];
    int runs = 0;
#pragma unroll
    for (int c = 1; c < 4; ++c) {
      if (of[c] == of[c - 1]) {
        run += sums[c];
        if (runs == 0) head = run;
      } else {
        if (runs > 0 && of[c - 1] >= 0) row[of[c - 1]] = run;
        ++runs;
        run = sums[c];
      }
    }
    // The sum of the run that ends with a lane, from wherever it begins.
    float until = run;
    bool open = runs == 0;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, until, distance);
      const int before_of = __shfl_up_sync(0xffffffffu, of[3], distance);
      const bool before_open = __shfl_up_sync(0xffffffffu, static_cast<int>(open), distance) != 0;
      if (lane >= distance && open && before_of == of[0]) {
        until += before;
        open = before_open;
      } else if (lane >= distance && open) {
        open = false;
      }
    }
    const float left = __shfl_up_sync(0xffffffffu, until, 1);
    const int left_of = __shfl_up_sync(0xffffffffu, of[3], 1);
    const int right_of = __shfl_down_sync(0xffffffffu, of[0], 1);
    if (runs > 0 && of[0] >= 0) {
      row[of[0]] = lane > 0 && left_of == of[0] ? left + head : head;
    }
    if (of[3] >= 0 && (lane + 1 == kWarp || right_of != of[3])) row[of[3]] = until;
  }

  template <int kTiles>
  __device__ __forceinline__ void add(const GramTask& task, int row, int col,
                                      const float (&products)[kTiles][4], float4* scratch) {
    static_assert(8 * kTiles == kSumCols);
    const int lane = threadIdx.x % kWarp;
    float* const memory = reinterpret_cast<float*>(scratch);
    // Groups of eight columns are permuted by the row, so that a warp's rows lie in other banks.
    const auto at = [&](int r, int c) { return memory + r * kSumCols + (c ^ (r % 8 * 8)); };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        *reinterpret_cast<float2*>(at(lane / 4 + e / 2 * 8, 8 * j + lane % 4 * 2)) =
            make_float2(products[j][e], products[j][e + 1]);
      }
    }
    int own = -1, of[4];
    if (lane < kSumRows && row + lane < task.row_end) own = p.segments[row + lane];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int t = col + 4 * lane + c;
      of[c] = t < task.col_end ? p.segments2[t] : -1;
    }
    __syncwarp();
    float* const to = p.partial + col / kSumCols;
    const int64_t first_row = row / kSumRows;
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
    int segment = -1;
    for (int r = 0; r < kSumRows; ++r) {
      const int next = __shfl_sync(0xffffffffu, own, r);
      if (next != segment) {
        if (segment >= 0) store_row(sums, of, to + (first_row + segment) * p.width);
        segment = next;
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] = 0.f;
      }
      if (next < 0) break;
      const float4 values = *reinterpret_cast<const float4*>(at(r, 4 * lane));
      sums[0] += values.x;
      sums[1] += values.y;
      sums[2] += values.z;
      sums[3] += values.w;
    }
    if (segment >= 0) store_row(sums, of, to + (first_row + segment) * p.width);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    ghost_dot_pairs_kernel(const __grid_constant__ CUtensorMap a,
                           const __grid_constant__ CUtensorMap g,
                           const __grid_constant__ CUtensorMap a2,
                           const __grid_constant__ CUtensorMap g2,
                           const __grid_constant__ PairParams p) {
  const GramBlock<Traits> block(p.cut, p.d_in, p.d_out);
  const int blocks = p.cut.parts * Traits::kRowBlocks;
  wait_for_previous_kernel();
  if (block.is_producer()) {
    block.produce(block.of_first ? &a : &g, block.of_first ? &a2 : &g2,
                  PairTasks<Traits>{p, blockIdx.x / blocks, gridDim.x / blocks});
  } else {
    PairSink sink{p};
    block.consume(sink);
  }
  block.leave();
}

template <class Traits>
Tensor pairs_typed(const Tensor& a, const Tensor& g, const Tensor& segments, const Tensor& a2,
                   const Tensor& g2, const Tensor& segments2, int64_t n, int64_t n2,
                   const GramCut& cut) {
  using T = typename Traits::T;
  const Device device(a);
  const auto kernel = ghost_dot_pairs_kernel<Traits>;
  const Clusters clusters{reinterpret_cast<const void*>(kernel), Traits::kThreads,
                          cut.parts * Traits::kRowBlocks, cut.shared_bytes<Traits>()};
  const int64_t rows = a.size(0), cols = a2.size(0);
  const Tensor partial =
      new_float(a, {ceil_div(rows, kSumRows) + n, ceil_div(cols, kSumCols) + n2});
  const int64_t tiles = ceil_div(rows, Traits::kN) * ceil_div(cols, Traits::kN);
  const PairParams params{segments.const_data_ptr<int32_t>(),
                          segments2.const_data_ptr<int32_t>(),
                          static_cast<int>(rows),
                          static_cast<int>(cols),
                          static_cast<int>(a.size(1)),
                          static_cast<int>(g.size(1)),
                          cut,
                          partial.mutable_data_ptr<float>(),
                          partial.size(1)};
  clusters.launch(device, std::min(tiles, clusters.resident(device)), kernel,
                  describe_matrix<T>(a, Traits::kM), describe_matrix<T>(g, Traits::kM),
                  describe_matrix<T>(a2, Traits::kM), describe_matrix<T>(g2, Traits::kM), params);
  return partial;
}

template <class T>
Tensor pairs_of_tile(const Tensor& a, const Tensor& g, const Tensor& segments, const Tensor& a2,
                     const Tensor& g2, const Tensor& segments2, int64_t n, int64_t n2, int64_t tile,
                     const GramCut& cut) {
  for (const Tensor* matrix : {&a, &g, &a2, &g2}) {
    if (!fits_copy_engine<T>(*matrix)) return new_float(a, {0, 0});
  }
  const auto pairs =
      tile == 128 ? pairs_typed<GramTraits<T, 128, 1>> : pairs_typed<GramTraits<T, 256, 2>>;
  return pairs(a, g, segments, a2, g2, segments2, n, n2, cut);
}

// The caller, ghost_dot, has checked the arguments.
Tensor ghost_dot_pairs_sm90(const Tensor& a, const Tensor& g, const Tensor& segments,
                            const Tensor& a2, const Tensor& g2, const Tensor& segments2, int64_t n,
                            int64_t n2, int64_t tile, int64_t parts, int64_t a_parts,
                            int64_t stages) {
  const GramCut cut{static_cast<int>(parts), static_cast<int>(a_parts), static_cast<int>(stages)};
  switch (a.scalar_type()) {
    case ScalarType::BFloat16:
      return pairs_of_tile<BFloat16>(a, g, segments, a2, g2, segments2, n, n2, tile, cut);
    case ScalarType::Half:
      return pairs_of_tile<Half>(a, g, segments, a2, g2, segments2, n, n2, tile, cut);
    default:
      return new_float(a, {0, 0});
  }
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(ghost_dot_pairs_sm90)

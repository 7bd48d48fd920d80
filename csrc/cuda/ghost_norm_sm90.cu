// ghost_norm_grams_sm90: the Gram form of ghost_norm by gram_tiles_sm90.cuh.
//
// sum_{s,t} (a_s . a_t)(g_s . g_t) over the tiles of token pairs s <= t of every segment. A cluster
// owns a contiguous range of the tiles, which the caller has numbered, and a warp leaves one sum
// for each segment that its cluster's range meets, in
//
//   slots (clusters + segments, warps of a tile) fp64, row `cluster + segment`
//
// so a slot has one writer and no sum depends on the order of blocks. Limiter: bytes for segments
// up to about 200 tokens, then arithmetic.
#include "common/checks.h"
#include "cuda/gram_tiles_sm90.cuh"
#include "cuda/offsets.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_norm_grams_sm90";

struct NormParams {
  Offsets offsets;
  const int64_t* first;  // (n + 1): the tiles before each segment
  int d_in, d_out;
  GramCut cut;
  double* slots;
};

__device__ __forceinline__ int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// The tiles of a cluster in turn.
template <class Traits>
struct NormTasks {
  const NormParams& p;
  int64_t number, last;
  int64_t segment = 0, segment_end = 0;

  __device__ NormTasks(const NormParams& params, int64_t cluster, int64_t clusters) : p(params) {
    const int64_t tasks = p.first[p.offsets.n], used = min(tasks, clusters);
    number = cluster < used ? tasks * cluster / used : 0;
    last = cluster < used ? tasks * (cluster + 1) / used : 0;
  }

  __device__ __forceinline__ GramTask operator()() {
    GramTask task{};
    if (number == last) {
      task.stop = true;
      return task;
    }
    if (number >= segment_end) find_segment();
    const int64_t tile = number++ - p.first[segment];
    int64_t col = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
    while (triangle(col) > tile) --col;
    while (triangle(col + 1) <= tile) ++col;
    const int64_t row = tile - triangle(col), begin = p.offsets.begin(segment);
    task.row = static_cast<int>(begin + row * Traits::kN);
    task.col = static_cast<int>(begin + col * Traits::kN);
    task.row_end = task.col_end = static_cast<int>(p.offsets.end(segment));
    task.segment = static_cast<int>(segment);
    task.same = row == col;
    return task;
  }

  // The last segment whose first tile is `number` or one before; by all lanes of the warp.
  __device__ __forceinline__ void find_segment() {
    int64_t low = segment, high = p.offsets.n;
    while (high - low > 1) {
      const int64_t step = ceil_div(high - low, kWarp), at = low + threadIdx.x % kWarp * step;
      const bool before = at < high && p.first[at] <= number;
      low += (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
      high = min(high, low + step);
    }
    segment = low;
    segment_end = p.first[segment + 1];
  }
};

// A warp's sums by segment.
struct NormSink {
  double* slots;  // of this cluster and warp
  int width;      // slots of a segment
  int segment = -1;
  double sum = 0;

  __device__ __forceinline__ void begin(const GramTask& task) {
    if (task.segment == segment) return;
    end();
    segment = task.segment;
    sum = 0;
  }

  template <int kTiles>
  __device__ __forceinline__ void add(const GramTask& task, int row, int col,
                                      const float (&products)[kTiles][4], float4*) {
    const int lane = threadIdx.x % kWarp;
    float tile_sum = 0.f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int s = row + lane / 4 + e / 2 * 8, t = col + 8 * j + lane % 4 * 2 + e % 2;
        // A pair counts for itself and for the mirrored one.
        if (t < task.col_end && s <= t) tile_sum += s == t ? products[j][e] : 2.f * products[j][e];
      }
    }
    sum += tile_sum;
  }

  __device__ __forceinline__ void end() {
    if (segment < 0) return;
    const double total = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) slots[int64_t{segment} * width] = total;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    ghost_norm_grams_kernel(const __grid_constant__ CUtensorMap a,
                            const __grid_constant__ CUtensorMap g,
                            const __grid_constant__ NormParams p) {
  const GramBlock<Traits> block(p.cut, p.d_in, p.d_out);
  const int blocks = p.cut.parts * Traits::kRowBlocks;
  const int64_t cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  wait_for_previous_kernel();
  if (block.is_producer()) {
    const CUtensorMap* const matrix = block.of_first ? &a : &g;
    block.produce(matrix, matrix, NormTasks<Traits>(p, cluster, clusters));
  } else {
    constexpr int kWidth = Traits::kRowBlocks * Traits::kWarps;
    const int own = block.row_block * Traits::kWarps + threadIdx.x / kWarp;
    NormSink sink{p.slots + cluster * kWidth + own, kWidth};
    block.consume(sink);
  }
  block.leave();
}

template <class Traits>
Tensor grams_typed(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens, const Tensor& first,
                   const GramCut& cut) {
  using T = typename Traits::T;
  const Device device(a);
  const auto kernel = ghost_norm_grams_kernel<Traits>;
  const Clusters clusters{reinterpret_cast<const void*>(kernel), Traits::kThreads,
                          cut.parts * Traits::kRowBlocks, cut.shared_bytes<Traits>()};
  const int64_t n_clusters = clusters.resident(device), n = cu_seqlens.size(0) - 1;
  const Tensor slots = torch::stable::new_empty(
      a, {n_clusters + n, Traits::kRowBlocks * Traits::kWarps}, ScalarType::Double);
  const NormParams params{offsets_of(kOp, "cu_seqlens", cu_seqlens, a.size(0)),
                          first.const_data_ptr<int64_t>(),
                          static_cast<int>(a.size(1)),
                          static_cast<int>(g.size(1)),
                          cut,
                          slots.mutable_data_ptr<double>()};
  clusters.launch(device, n_clusters, kernel, describe_matrix<T>(a, Traits::kM),
                  describe_matrix<T>(g, Traits::kM), params);
  return slots;
}

template <class T>
Tensor grams_of_tile(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens,
                     const Tensor& first, int64_t tile, const GramCut& cut) {
  if (!fits_copy_engine<T>(a) || !fits_copy_engine<T>(g)) {
    return torch::stable::new_empty(a, {0, 0}, ScalarType::Double);
  }
  if (tile == 64) return grams_typed<GramTraits<T, 64, 1>>(a, g, cu_seqlens, first, cut);
  if (tile == 128) return grams_typed<GramTraits<T, 128, 1>>(a, g, cu_seqlens, first, cut);
  return grams_typed<GramTraits<T, 256, 2>>(a, g, cu_seqlens, first, cut);
}

// The caller, ghost_norm, has checked the arguments. `first` (n + 1) int64 numbers the tiles of
// `tile` x `tile` tokens, column by column of each segment's upper triangle.
Tensor ghost_norm_grams_sm90(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens,
                             const Tensor& first, int64_t tile, int64_t parts, int64_t a_parts,
                             int64_t stages) {
  const GramCut cut{static_cast<int>(parts), static_cast<int>(a_parts), static_cast<int>(stages)};
  switch (a.scalar_type()) {
    case ScalarType::BFloat16:
      return grams_of_tile<BFloat16>(a, g, cu_seqlens, first, tile, cut);
    case ScalarType::Half:
      return grams_of_tile<Half>(a, g, cu_seqlens, first, tile, cut);
    default:
      return torch::stable::new_empty(a, {0, 0}, ScalarType::Double);
  }
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(ghost_norm_grams_sm90)

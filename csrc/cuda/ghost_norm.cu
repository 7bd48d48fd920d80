// ghost_norm: out[i] = || sum_{t in segment i} g_t a_t^T ||_F^2
//
// a (total_tokens, d_in), g (total_tokens, d_out), cu_seqlens (n + 1) -> (n) fp32; any strides.
//
// Two exact forms, chosen on the device for each segment of T_i tokens:
//   Gram      sum_{s,t} (a_s . a_t)(g_s . g_t) over tiles of token pairs s <= t; tiles off the
//             diagonal count twice.                          T_i^2 (d_in + d_out) / 2 multiply-adds
//   gradient  the sum of squares of G_i^T A_i over its tiles.             T_i d_in d_out
// A task is one tile. The tasks of all segments are numbered; a block owns a contiguous range of
// them, a warp a part of the tile, and a lane adds its elements' squares or products. A block
// writes one partial sum for each segment that its range meets, to slot `block + segment`: both
// only grow along the tasks, so a slot has one writer. Nothing larger than a tile is stored.
// Limiter: arithmetic; bytes for segments shorter than about 200 tokens.
#include <array>

#include "cuda/choose.h"
#include "cuda/offsets.cuh"
#include "cuda/tile_product.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_norm";

// Blocks of a multiprocessor: limited by shared memory, and by registers for two accumulators.
template <class Traits, Contract kContract>
constexpr int kBlocksPerSm = Traits::kM == 64                                        ? 3
                             : Traits::kWarpgroups && kContract == Contract::kTokens ? 2
                                                                                     : 1;

constexpr int kPlanThreads = 1024;

// The inclusive sum over the threads of a block up to each; `shared` holds one a warp.
__device__ int64_t block_scan(int64_t value, int64_t* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  __syncthreads();  // the last call's sums are no longer read
  if (lane == kWarp - 1) shared[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += shared[w];
  return value;
}

// first_gram[i], first_gradient[i] (n + 1 each): the tasks of both forms before segment i.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(Offsets offsets, GhostSizes sizes, int64_t* first_gram, int64_t* first_gradient,
                int* report) {
  __shared__ int64_t sums[kPlanThreads / kWarp];
  __shared__ int64_t totals[2];
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  const int64_t gradient_tiles =
      ceil_div(sizes.d_in, sizes.gradient_tile) * ceil_div(sizes.d_out, sizes.gradient_tile);
  for (int64_t base = 0; base < offsets.n; base += kPlanThreads) {
    const int64_t i = base + threadIdx.x;
    int64_t gram = 0, gradient = 0;
    if (i < offsets.n) {
      const int64_t tokens = offsets.end(i) - offsets.begin(i);
      if (!offsets.is_valid(i)) {
        *report = 1;
        __threadfence_system();
      } else if (tokens > 0) {
        if (gram_form_is_cheaper(tokens, sizes)) {
          gram = triangle(ceil_div(tokens, sizes.gram_tile));
        } else {
          gradient = gradient_tiles;
        }
      }
    }
    const int64_t gram_sum = block_scan(gram, sums), gradient_sum = block_scan(gradient, sums);
    const int64_t gram_before = totals[0], gradient_before = totals[1];
    if (i < offsets.n) {
      first_gram[i] = gram_before + gram_sum - gram;
      first_gradient[i] = gradient_before + gradient_sum - gradient;
    }
    __syncthreads();
    if (threadIdx.x == kPlanThreads - 1) {
      totals[0] = gram_before + gram_sum;
      totals[1] = gradient_before + gradient_sum;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    first_gram[offsets.n] = totals[0];
    first_gradient[offsets.n] = totals[1];
  }
}

// Blocks that have tasks, and the first task of each.
struct Shares {
  int64_t tasks, blocks;

  __device__ Shares(int64_t n_tasks, int64_t n_blocks)
      : tasks(n_tasks), blocks(min(n_tasks, n_blocks)) {}
  __device__ int64_t first(int64_t block) const { return tasks * block / blocks; }
  __device__ int64_t owner(int64_t task) const { return ceil_div((task + 1) * blocks, tasks) - 1; }
};

// The sum over a block in a fixed order, in thread 0; `shared` holds a double a warp.
__device__ double block_sum(double value, double* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += shared[warp];
  }
  __syncthreads();
  return sum;
}

// The share of one tile of token pairs of a segment; `tile` counts them column by column of the
// upper triangle.
template <class Traits>
__device__ __forceinline__ float gram_tile(const Operand<typename Traits::T>& a,
                                           const Operand<typename Traits::T>& g, int64_t begin,
                                           int64_t end, int64_t tile, unsigned char* shared) {
  int64_t col = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
  while (triangle(col) > tile) --col;
  while (triangle(col + 1) <= tile) ++col;
  const int64_t row = tile - triangle(col);
  const int64_t s = begin + row * Traits::kM, t = begin + col * Traits::kN;
  Accumulator<Traits> of_a, of_g;
  TilePipeline<Traits, Contract::kFeatures>(shared).multiply(
      {a, a, s, end, t, end, 0, a.cols, row == col}, of_a,
      {g, g, s, end, t, end, 0, g.cols, row == col}, of_g);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kColTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(of_a.part[i][j][e], of_g.part[i][j][e], sum);
    }
  }
  return row == col ? sum : 2.f * sum;
}

// The sum of squares of one tile of a segment's gradient.
template <class Traits>
__device__ __forceinline__ float gradient_tile(const Operand<typename Traits::T>& a,
                                               const Operand<typename Traits::T>& g, int64_t begin,
                                               int64_t end, int64_t tile, unsigned char* shared) {
  const int64_t in_tiles = ceil_div(a.cols, Traits::kN);
  const int64_t out = tile / in_tiles * Traits::kM, in = tile % in_tiles * Traits::kN;
  Accumulator<Traits> acc;
  TilePipeline<Traits, Contract::kTokens>(shared).multiply(
      {g, a, out, g.cols, in, a.cols, begin, end, false}, acc);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kColTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(acc.part[i][j][e], acc.part[i][j][e], sum);
    }
  }
  return sum;
}

// partial[block + segment] = the block's share of the segment.
template <class Traits, Contract kContract>
__global__ void __launch_bounds__(Traits::kThreads, kBlocksPerSm<Traits, kContract>)
    ghost_norm_kernel(Operand<typename Traits::T> a, Operand<typename Traits::T> g, Offsets offsets,
                      const int64_t* first, double* partial) {
  __shared__ double sums[Traits::kThreads / kWarp];
  const Shares shares(first[offsets.n], gridDim.x);
  if (blockIdx.x >= shares.blocks) return;
  const int64_t last = shares.first(blockIdx.x + 1);
  int64_t segment = -1, begin = 0, end = 0, segment_end = 0;
  double sum = 0;
  for (int64_t task = shares.first(blockIdx.x); task < last; ++task) {
    if (task >= segment_end) {
      if (segment >= 0) {
        const double total = block_sum(sum, sums);
        if (threadIdx.x == 0) partial[blockIdx.x + segment] = total;
        sum = 0;
      }
      int64_t low = segment + 1, high = offsets.n;  // the last segment with first <= task
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first[middle] <= task) {
          low = middle;
        } else {
          high = middle;
        }
      }
      segment = low;
      segment_end = first[segment + 1];
      begin = offsets.begin(segment);
      end = offsets.end(segment);
    }
    const int64_t tile = task - first[segment];
    if constexpr (kContract == Contract::kFeatures) {
      sum += gram_tile<Traits>(a, g, begin, end, tile, dynamic_shared());
    } else {
      sum += gradient_tile<Traits>(a, g, begin, end, tile, dynamic_shared());
    }
  }
  const double total = block_sum(sum, sums);
  if (threadIdx.x == 0) partial[blockIdx.x + segment] = total;
}

// The partial sums of one form: the blocks that wrote them and their place, `width` a slot.
struct Partials {
  const int64_t* first;
  const double* slots;
  int64_t n_blocks, width;

  __device__ double of_segment(int64_t segment, int64_t n_segments) const {
    const int64_t from = first[segment], to = first[segment + 1];
    if (from == to) return 0;
    const Shares shares(first[n_segments], n_blocks);
    double sum = 0;
    for (int64_t block = shares.owner(from); block <= shares.owner(to - 1); ++block) {
      const double* slot = slots + (block + segment) * width;
      for (int64_t i = 0; i < width; ++i) sum += slot[i];
    }
    return sum;
  }
};

__global__ void collect_kernel(Offsets offsets, Partials gram, Partials gradient, float* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= offsets.n) return;
  const double sum = gram.of_segment(i, offsets.n) + gradient.of_segment(i, offsets.n);
  out[i] = offsets.is_valid(i) ? static_cast<float>(sum) : __uint_as_float(0x7fc00000u);
}

// The result of ghost_norm_grams_sm90 (described there); its first size is 0 where the op is not
// built.
Tensor hopper_grams(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens, const Tensor& first,
                    const FeatureParts& cut) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(a),     from(g),         from(cu_seqlens),
                                    from(first), from(cut.parts), from(cut.a_parts)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(GEFFECT_FAST_OP("ghost_norm_grams_sm90"), "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
Tensor ghost_norm_typed(const Device& device, const Tensor& a_tensor, const Tensor& g_tensor,
                        const Tensor& cu_seqlens, const Offsets& offsets, int* report) {
  const OperandHolder<T> a_held(a_tensor), g_held(g_tensor);
  const Operand<T> a = a_held.operand(), g = g_held.operand();
  const int64_t n = offsets.n;
  const bool by_clusters = kTensorCores<T> && device.has_warpgroups() && a.cols > 0 && g.cols > 0 &&
                           grams_by_clusters(offsets.total, n);
  const bool large = kTensorCores<T> && !by_clusters && by_large_tiles(offsets.total, n);
  const GhostSizes sizes{a.cols,       g.cols,           large ? kLargeGramTile : kSmallGramTile,
                         kTileSide<T>, SmallTile<T>::kK, ghost_form()};

  const int64_t max_blocks = 3 * device.n_multiprocessors();
  const Tensor out = new_float(a_tensor, {n});
  const Tensor first = torch::stable::new_empty(a_tensor, {2, n + 1}, ScalarType::Long);
  const Tensor slots = torch::stable::new_empty(a_tensor, {2, max_blocks + n}, ScalarType::Double);
  int64_t* first_gram = first.mutable_data_ptr<int64_t>();
  double* gram_slots = slots.mutable_data_ptr<double>();
  Partials gram{first_gram, gram_slots, 0, 1};
  Partials gradient{first_gram + n + 1, gram_slots + max_blocks + n, 0, 1};
  device.launch(plan_kernel, dim3(1), dim3(kPlanThreads), 0, offsets, sizes, first_gram,
                first_gram + n + 1, report);

  const auto run = [&](auto traits, auto contract, Partials& partials) {
    using Traits = decltype(traits);
    constexpr Contract kContract = decltype(contract)::value;
    partials.n_blocks = kBlocksPerSm<Traits, kContract> * device.n_multiprocessors();
    device.launch(ghost_norm_kernel<Traits, kContract>,
                  dim3(static_cast<unsigned>(partials.n_blocks)), dim3(Traits::kThreads),
                  Traits::kSharedBytes, a, g, offsets, partials.first,
                  const_cast<double*>(partials.slots));
  };
  using Features = std::integral_constant<Contract, Contract::kFeatures>;
  using Tokens = std::integral_constant<Contract, Contract::kTokens>;
  Tensor cluster_slots = torch::stable::new_empty(a_tensor, {0}, ScalarType::Double);
  if (by_clusters) {
    cluster_slots = hopper_grams(a_held.tensor(), g_held.tensor(), cu_seqlens, first,
                                 feature_parts(n, a.cols, g.cols, device.n_multiprocessors()));
  }
  if (cluster_slots.size(0) > 0) {
    gram = {first_gram, cluster_slots.const_data_ptr<double>(), cluster_slots.size(0) - n,
            cluster_slots.size(1)};
  } else if (sizes.form != GhostForm::kGradient) {
    if (large) {
      with_tile<T, HopperTile>(device, [&](auto tile) { run(tile, Features{}, gram); });
    } else {
      run(SmallTile<T>{}, Features{}, gram);
    }
  }
  // The gradient gains on the Gram with every further tile of tokens: the shortest segment of as
  // many tiles as all tokens would make is the best case for it.
  const int64_t tiles = ceil_div(offsets.total, sizes.gram_tile);
  if (tiles > 0 && !gram_form_is_cheaper((tiles - 1) * sizes.gram_tile + 1, sizes)) {
    with_tile<T, HopperPairedTile>(device, [&](auto tile) { run(tile, Tokens{}, gradient); });
  }
  device.launch(collect_kernel, dim3(static_cast<unsigned>(ceil_div(n, 128))), dim3(128), 0,
                offsets, gram, gradient, out.mutable_data_ptr<float>());
  return out;
}

Tensor ghost_norm(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "g", g, 2);
  check_shape(kOp, "g", g, {a.size(0), g.size(1)});
  check_dtype(kOp, "g", g, a.scalar_type());
  check_one_device(kOp, {&a, &g, &cu_seqlens});
  const Device device(a);
  const Offsets offsets = offsets_of(kOp, "cu_seqlens", cu_seqlens, a.size(0));
  int* report = OffsetReport::device_word(kOp, kGhostNorm);
  return dispatch_cuda_dtype(kOp, a.scalar_type(), [&](auto type) {
    if (offsets.n == 0) return new_float(a, {0});
    return ghost_norm_typed<decltype(type)>(device, a, g, cu_seqlens, offsets, report);
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(ghost_norm)

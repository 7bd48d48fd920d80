// ghost_norm_grams_sm90: the Gram form of ghost_norm for short segments, with Hopper's copy engine,
// matrix instruction and clusters.
//
// sum_{s,t} (a_s . a_t)(g_s . g_t) over tiles of 64 x 64 pairs s <= t of every segment. A cluster
// of blocks owns a tile. The features of a and g are laid side by side and cut into `parts`
// contiguous ranges, a block each, the first `a_parts` of them of a. A producer warp brings the
// tile's tokens, 64 features at a time, several slabs ahead; four warps multiply. Then every 16
// rows of the tile are collected by one of the blocks, to which the others send their sums through
// distributed shared memory; it adds up the parts of each Gram and multiplies the Grams. The next
// tile's copies go on meanwhile.
//
// A cluster owns a contiguous range of the tiles, which the caller has numbered, and a warp leaves
// one sum for each segment that its cluster's range meets, in
//
//   slots (clusters + segments, 4) fp64, row `cluster + segment`
//
// so a slot has one writer and no sum depends on the order of blocks. Limiter: bytes; on an H100,
// segments of 64 tokens are read at up to 83 % of a copy's rate.
#include "common/checks.h"
#include "cuda/clusters.cuh"
#include "cuda/copy_engine.cuh"
#include "cuda/device.cuh"
#include "cuda/offsets.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/warpgroup.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "ghost_norm_grams_sm90";

constexpr int kTile = 64, kWarps = kTile / 16, kThreads = kWarp * (kWarps + 1);
constexpr int kPanel = kTile * 128, kStage = 2 * kPanel;  // rows' tokens and columns'
constexpr int kStages = 6, kTasksAhead = 4, kBlocksPerSm = 2;
constexpr int kColTiles = kTile / 8;
constexpr int kPlace = 16 * kTile * 4;  // bytes of 16 rows of sums

// A tile: its first tokens and the end of its segment's.
struct Task {
  int row, col, end;
  int segment;
  bool same;  // rows and columns are the same tokens: they are copied once
  bool stop;  // no tile: there are no more
};

struct Barriers {
  Barrier full[kStages], empty[kStages];
  Barrier task_full[kTasksAhead], task_empty[kTasksAhead];
  Barrier sent[kWarps], taken[kWarps];  // of every 16 rows
  Task tasks[kTasksAhead];
};

struct Params {
  Offsets offsets;
  const int64_t* first;  // (n + 1): the tiles before each segment
  int d_in, d_out;
  int parts, a_parts;
  double* slots;
};

// The number of 16-row groups that a block collects, and the places for the sums of other blocks.
__host__ __device__ constexpr int collected(int parts) { return kWarps / parts; }
__host__ __device__ constexpr int places(int parts) { return (parts - 1) * collected(parts); }

constexpr size_t shared_bytes(int parts) {
  return size_t{kStages} * kStage + places(parts) * size_t{kPlace} + sizeof(Barriers);
}

__device__ __forceinline__ int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// A position in a ring of barriers.
struct Ring {
  int size, index = 0, parity = 0;

  __device__ explicit Ring(int n) : size(n) {}
  __device__ __forceinline__ void step() {
    if (++index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The tiles of a cluster in turn; called by all lanes of a warp.
struct Tasks {
  const Params& p;
  int64_t number, last;
  int64_t segment = 0, segment_end = 0;

  __device__ Tasks(const Params& params, int64_t cluster, int64_t clusters) : p(params) {
    const int64_t tasks = p.first[p.offsets.n], used = min(tasks, clusters);
    number = cluster < used ? tasks * cluster / used : 0;
    last = cluster < used ? tasks * (cluster + 1) / used : 0;
  }

  __device__ __forceinline__ Task next() {
    Task task{};
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
    task.row = static_cast<int>(begin + row * kTile);
    task.col = static_cast<int>(begin + col * kTile);
    task.end = static_cast<int>(p.offsets.end(segment));
    task.segment = static_cast<int>(segment);
    task.same = row == col;
    return task;
  }

  // The last segment whose first tile is `number` or one before: 32 are looked at at once.
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
struct Sums {
  double* slots;  // of this cluster and warp
  int segment = -1;
  double sum = 0;

  __device__ explicit Sums(double* first) : slots(first) {}

  __device__ __forceinline__ void begin(const Task& task) {
    if (task.segment == segment) return;
    store();
    segment = task.segment;
    sum = 0;
  }
  __device__ __forceinline__ void store() const {
    if (segment < 0) return;
    const double total = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) slots[int64_t{segment} * kWarps] = total;
  }
};

// A block's place in its cluster, and its work on a tile of T.
template <class T>
struct Block {
  const Params& p;
  int part, first_slab, last_slab;
  bool of_a;
  unsigned char *stages, *sent;
  Barriers* barriers;

  __device__ explicit Block(const Params& params) : p(params), part(cluster_rank()) {
    of_a = part < p.a_parts;
    const int slabs = static_cast<int>(ceil_div(of_a ? p.d_in : p.d_out, 64));
    const int own = of_a ? part : part - p.a_parts, n = of_a ? p.a_parts : p.parts - p.a_parts;
    first_slab = slabs * own / n;
    last_slab = slabs * (own + 1) / n;
    stages = dynamic_shared();
    sent = stages + kStages * kStage;
    barriers = reinterpret_cast<Barriers*>(sent + places(p.parts) * kPlace);
    check_tile_memory(stages);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&barriers->full[i], 1);
        barrier_init(&barriers->empty[i], kWarps);
      }
      for (int i = 0; i < kTasksAhead; ++i) {
        barrier_init(&barriers->task_full[i], 1);
        barrier_init(&barriers->task_empty[i], kWarps);
      }
      for (int i = 0; i < kWarps; ++i) {
        barrier_init(&barriers->sent[i], p.parts - 1);
        barrier_init(&barriers->taken[i], 1);
      }
      publish_barriers();
    }
    cluster_sync();
  }

  // By the last warp: brings the tiles.
  __device__ __forceinline__ void produce(const CUtensorMap* matrix, Tasks tasks) const {
    const int lane = threadIdx.x % kWarp;
    Ring slab_at(kStages), task_at(kTasksAhead);
    bool stop = false;
    while (!stop) {
      const Task task = tasks.next();
      stop = task.stop;
      if (lane == 0) {
        barrier_wait(&barriers->task_empty[task_at.index], task_at.parity ^ 1);
        barriers->tasks[task_at.index] = task;
        barrier_arrive(&barriers->task_full[task_at.index]);
        task_at.step();
        for (int slab = first_slab; slab < last_slab && !stop; ++slab) {
          unsigned char* const rows = stages + slab_at.index * kStage;
          Barrier* const full = &barriers->full[slab_at.index];
          barrier_wait(&barriers->empty[slab_at.index], slab_at.parity ^ 1);
          barrier_expect(full, task.same ? kPanel : 2 * kPanel);
          copy_box(rows, matrix, task.row, slab * 64, full);
          if (!task.same) copy_box(rows + kPanel, matrix, task.col, slab * 64, full);
          slab_at.step();
        }
      }
      __syncwarp();
    }
  }

  // By the others: multiplies them.
  __device__ __forceinline__ void consume(Sums sums) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int owner = warp / collected(p.parts);  // the block that collects this warp's rows
    float4* const own_places =
        reinterpret_cast<float4*>(sent + warp % collected(p.parts) * (p.parts - 1) * kPlace);
    const int sender = part < owner ? part : part - 1;
    Ring slab_at(kStages), task_at(kTasksAhead);
    for (int parity = 0;; parity ^= 1) {
      barrier_wait(&barriers->task_full[task_at.index], task_at.parity);
      const Task task = barriers->tasks[task_at.index];
      __syncwarp();
      if (lane == 0) barrier_arrive(&barriers->task_empty[task_at.index]);
      task_at.step();
      if (task.stop) break;
      float acc[kColTiles][4];
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] = 0.f;
      }
      multiply(task, slab_at, acc);
      if (part != owner) {
        barrier_wait(&barriers->taken[warp], parity ^ 1);
        float4* const to = own_places + sender * (kPlace / 16);
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          store_at(to + j * kWarp + lane, owner,
                   make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive_at(&barriers->sent[warp], owner);
      } else {
        sums.begin(task);
        barrier_wait(&barriers->sent[warp], parity);
        sums.sum += products(task, acc, own_places);
        __syncwarp();
        if (lane + 1 < p.parts) {
          barrier_arrive_at(&barriers->taken[warp], lane < part ? lane : lane + 1);
        }
      }
    }
    if (part == owner) sums.store();
  }

  // acc = this block's part of its Gram.
  __device__ __forceinline__ void multiply(const Task& task, Ring& slab_at,
                                           float (&acc)[kColTiles][4]) const {
    int before = -1;  // the stage whose products are in flight
    const auto give_back = [&](int stage) {
      if (threadIdx.x % kWarp == 0) barrier_arrive(&barriers->empty[stage]);
    };
    for (int slab = first_slab; slab < last_slab; ++slab) {
      barrier_wait(&barriers->full[slab_at.index], slab_at.parity);
      const unsigned char* const rows = stages + slab_at.index * kStage;
      const uint64_t left = describe_tile<false>(rows, 0);
      const uint64_t right = describe_tile<false>(task.same ? rows : rows + kPanel, 0);
      warpgroup_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 features are 32 bytes
        warpgroup_multiply_add<T, false>(acc, left + 2 * k, right + 2 * k);
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (before >= 0) give_back(before);
      before = slab_at.index;
      slab_at.step();
    }
    warpgroup_wait<0>();
    if (before >= 0) give_back(before);
  }

  // This lane's share of the tile: own sums and those of the other parts are added up by Gram, and
  // the Grams multiplied. A pair counts for itself and for the mirrored one.
  __device__ __forceinline__ float products(const Task& task, const float (&acc)[kColTiles][4],
                                            const float4* others) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      float own[4], other[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int e = 0; e < 4; ++e) own[e] = acc[j][e];
      for (int source = 0; source + 1 < p.parts; ++source) {
        const bool same_gram = ((source < part ? source : source + 1) < p.a_parts) == of_a;
        const float4 given = others[(source * kColTiles + j) * kWarp + lane];
        const float values[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          own[e] += same_gram ? values[e] : 0.f;
          other[e] += same_gram ? 0.f : values[e];
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int s = task.row + 16 * warp + lane / 4 + e / 2 * 8;
        const int t = task.col + 8 * j + lane % 4 * 2 + e % 2;
        if (t < task.end && s <= t) sum += (s == t ? own[e] : 2.f * own[e]) * other[e];
      }
    }
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    ghost_norm_grams_kernel(const __grid_constant__ CUtensorMap a,
                            const __grid_constant__ CUtensorMap g,
                            const __grid_constant__ Params p) {
  const Block<T> block(p);
  const int64_t cluster = blockIdx.x / p.parts, clusters = gridDim.x / p.parts;
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarp;
  if (warp == kWarps) {
    block.produce(block.of_a ? &a : &g, Tasks(p, cluster, clusters));
  } else {
    block.consume(Sums(p.slots + cluster * kWarps + warp));
  }
  __syncwarp();
  cluster_sync();  // no block leaves while others may still write to its memory
}

template <class T>
Tensor grams_typed(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens, const Tensor& first,
                   int parts, int a_parts) {
  const Device device(a);
  const int64_t n = cu_seqlens.size(0) - 1;
  const auto kernel = ghost_norm_grams_kernel<T>;
  const Clusters clusters{reinterpret_cast<const void*>(kernel), kThreads, parts,
                          shared_bytes(parts)};
  const int64_t n_clusters = clusters.resident(device);
  const Tensor slots =
      torch::stable::new_empty(a, {n_clusters + n, int64_t{kWarps}}, ScalarType::Double);
  const Params params{offsets_of(kOp, "cu_seqlens", cu_seqlens, a.size(0)),
                      first.const_data_ptr<int64_t>(),
                      static_cast<int>(a.size(1)),
                      static_cast<int>(g.size(1)),
                      parts,
                      a_parts,
                      slots.mutable_data_ptr<double>()};
  clusters.launch(device, n_clusters, kernel, describe_matrix<T>(a, kTile),
                  describe_matrix<T>(g, kTile), params);
  return slots;
}

// The caller, ghost_norm, has checked the arguments. `first` (n + 1) int64 numbers the tiles of 64
// x 64 tokens, column by column of each segment's upper triangle. Of first size 0 where the copy
// engine cannot read a or g.
Tensor ghost_norm_grams_sm90(const Tensor& a, const Tensor& g, const Tensor& cu_seqlens,
                             const Tensor& first, int64_t parts, int64_t a_parts) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (!fits_copy_engine<T>(a) || !fits_copy_engine<T>(g)) {
      return torch::stable::new_empty(a, {0, int64_t{kWarps}}, ScalarType::Double);
    }
    return grams_typed<T>(a, g, cu_seqlens, first, static_cast<int>(parts),
                          static_cast<int>(a_parts));
  };
  return a.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(Half{});
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(ghost_norm_grams_sm90)

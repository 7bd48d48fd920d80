// Tiles of the products of two Grams, (x_s . y_t)(u_s . v_t) for pairs of tokens s, t, with
// Hopper's copy engine, matrix instruction and clusters: the core of ghost_norm and ghost_dot on
// sm_90a.
//
// A cluster of blocks owns a tile. The features of both Grams are laid side by side and cut into
// `parts` contiguous ranges, a block each, the first `a_parts` of them of the first Gram. A
// producer warp brings the tile's tokens, 64 features at a time, several slabs ahead; the other
// warps multiply. Then every 16 rows of the tile are collected by one of the blocks, to which the
// others send their sums through distributed shared memory; it adds up the parts of each Gram,
// multiplies the Grams and hands the products to a sink. The next tile's copies go on meanwhile.
// Tiles of 256 x 256 are made by pairs of blocks of 128 rows that share the copies of their 256
// columns.
#pragma once

#include "cuda/copy_engine.cuh"
#include "cuda/device.cuh"
#include "cuda/warpgroup.cuh"

namespace geffect_fast {

// A block makes kM x kN products; kRowBlocks of them, one above the other, are a square tile.
template <class T_, int kN_, int kRowBlocks_>
struct GramTraits {
  using T = T_;
  static constexpr int kN = kN_, kRowBlocks = kRowBlocks_, kM = kN / kRowBlocks;
  static constexpr int kWarps = kM / 16, kThreads = kWarp * (kWarps + 1);
  static constexpr int kPanelX = kM * 128, kPanelY = kN * 128, kStage = kPanelX + kPanelY;
  // Columns that are sent at a time, and the place for 16 rows of them.
  static constexpr int kSent = std::min(kN, 128), kSentTiles = kSent / 8;
  static constexpr int kPlace = 16 * kSent * 4;
  static constexpr int kTasksAhead = 4;
  static constexpr int kBlocksPerSm = kN == 64 ? 2 : 1;
  static_assert(kM % 64 == 0 && kN <= 2 * kSent);

  // Times 16 rows that a block collects, and the places for what others send it.
  static constexpr int collected(int parts) { return kWarps / parts; }
  static constexpr int places(int parts) { return (parts - 1) * collected(parts); }
};

// A tile: its first tokens and the ends of the tokens that count.
struct GramTask {
  int row, col, row_end, col_end;
  int segment;  // for the sink
  bool same;    // rows and columns are the same tokens of one matrix: they are copied once
  bool stop;    // no tile: there are no more
};

struct GramBarriers {
  static constexpr int kMostStages = 6, kTasksAhead = 4, kMostWarps = 8;
  Barrier full[kMostStages], empty[kMostStages];
  Barrier task_full[kTasksAhead], task_empty[kTasksAhead];
  Barrier sent[kMostWarps], taken[kMostWarps];  // of every 16 rows
  GramTask tasks[kTasksAhead];
};

// How the features are cut, and the slabs that are copied ahead.
struct GramCut {
  int parts, a_parts, stages;

  template <class Traits>
  size_t shared_bytes() const {
    return static_cast<size_t>(stages) * Traits::kStage + Traits::places(parts) * Traits::kPlace +
           sizeof(GramBarriers);
  }
};

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

// A block's place in its cluster, and what it makes of a tile.
template <class Traits>
struct GramBlock {
  GramCut cut;
  int part, row_block;
  int first_slab, last_slab;
  bool of_first;  // of the first Gram
  unsigned char *stages, *places;
  GramBarriers* barriers;

  __device__ GramBlock(const GramCut& how, int d_first, int d_second) : cut(how) {
    const int rank = cluster_rank();
    part = rank / Traits::kRowBlocks;
    row_block = rank % Traits::kRowBlocks;
    of_first = part < cut.a_parts;
    const int slabs = static_cast<int>(ceil_div(of_first ? d_first : d_second, 64));
    const int own = of_first ? part : part - cut.a_parts;
    const int n = of_first ? cut.a_parts : cut.parts - cut.a_parts;
    first_slab = slabs * own / n;
    last_slab = slabs * (own + 1) / n;
    stages = dynamic_shared();
    places = stages + cut.stages * Traits::kStage;
    barriers = reinterpret_cast<GramBarriers*>(places + Traits::places(cut.parts) * Traits::kPlace);
    check_tile_memory(stages);
    if (threadIdx.x == 0) {
      for (int i = 0; i < cut.stages; ++i) {
        barrier_init(&barriers->full[i], 1);
        barrier_init(&barriers->empty[i], Traits::kWarps * Traits::kRowBlocks);
      }
      for (int i = 0; i < Traits::kTasksAhead; ++i) {
        barrier_init(&barriers->task_full[i], 1);
        barrier_init(&barriers->task_empty[i], Traits::kWarps);
      }
      for (int i = 0; i < Traits::kWarps; ++i) {
        barrier_init(&barriers->sent[i], cut.parts - 1);
        barrier_init(&barriers->taken[i], 1);
      }
      publish_barriers();
    }
    cluster_sync();
  }

  __device__ __forceinline__ bool is_producer() const {
    return threadIdx.x / kWarp == Traits::kWarps;
  }

  // Brings the tiles that `next` gives, a GramTask after the other, until one says stop; `next` is
  // called by all lanes of the producer's warp. x and y: the tokens of rows and of columns.
  template <class Next>
  __device__ __forceinline__ void produce(const CUtensorMap* x_matrix, const CUtensorMap* y_matrix,
                                          Next&& next) const {
    const int lane = threadIdx.x % kWarp;
    const auto ranks = static_cast<uint16_t>(3 << (part * Traits::kRowBlocks));
    Ring slab_at(cut.stages), task_at(Traits::kTasksAhead);
    bool stop = false;
    while (!stop) {
      const GramTask task = next();
      stop = task.stop;
      if (lane == 0) {
        barrier_wait(&barriers->task_empty[task_at.index], task_at.parity ^ 1);
        barriers->tasks[task_at.index] = task;
        barrier_arrive(&barriers->task_full[task_at.index]);
        task_at.step();
        for (int slab = first_slab; slab < last_slab && !stop; ++slab) {
          unsigned char* x = stages + slab_at.index * Traits::kStage;
          unsigned char* y = x + Traits::kPanelX;
          Barrier* full = &barriers->full[slab_at.index];
          barrier_wait(&barriers->empty[slab_at.index], slab_at.parity ^ 1);
          barrier_expect(full, (task.same ? 0 : Traits::kPanelX) + Traits::kPanelY);
          const int own = row_block * Traits::kM;
          if (!task.same) copy_box(x, x_matrix, task.row + own, slab * 64, full);
          if constexpr (Traits::kRowBlocks == 1) {
            copy_box(y, y_matrix, task.col, slab * 64, full);
          } else {
            copy_box_to(y + row_block * Traits::kPanelX, y_matrix, task.col + own, slab * 64, full,
                        ranks);
          }
          slab_at.step();
        }
      }
      __syncwarp();
    }
  }

  // Multiplies them. For every tile and 16 rows that this warp collects: sink.begin(task), and for
  // some columns at a time
  //
  //   sink.add(task, row, col, products, scratch)
  //
  // with the first row and column, products[j] of columns 8 j to 8 j + 7 in the arrangement of
  // multiply_add, and kPlace bytes of shared memory; at last sink.end().
  template <class Sink>
  __device__ __forceinline__ void consume(Sink& sink) const {
    constexpr int kColTiles = Traits::kN / 8, kSentTiles = Traits::kSentTiles;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int collected = Traits::collected(cut.parts);
    const int owner = warp / collected;  // the part whose block collects this warp's rows
    const int owner_rank = owner * Traits::kRowBlocks + row_block;
    float4* const own_places =
        reinterpret_cast<float4*>(places + warp % collected * (cut.parts - 1) * Traits::kPlace);
    const int sender = part < owner ? part : part - 1;
    Ring slab_at(cut.stages), task_at(Traits::kTasksAhead);
    int sent_parity = 0;
    while (true) {
      barrier_wait(&barriers->task_full[task_at.index], task_at.parity);
      const GramTask task = barriers->tasks[task_at.index];
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

      if (part == owner) sink.begin(task);
      // Not a loop: accumulators must be known by number.
      const auto exchange = [&](auto first_tile) {
        constexpr int from = decltype(first_tile)::value;
        if (part != owner) {
          barrier_wait(&barriers->taken[warp], sent_parity ^ 1);
          float4* const to = own_places + sender * (Traits::kPlace / 16);
#pragma unroll
          for (int j = 0; j < kSentTiles; ++j) {
            store_at(to + j * kWarp + lane, owner_rank,
                     make_float4(acc[from + j][0], acc[from + j][1], acc[from + j][2],
                                 acc[from + j][3]));
          }
          __syncwarp();
          if (lane == 0) barrier_arrive_at(&barriers->sent[warp], owner_rank);
        } else {
          barrier_wait(&barriers->sent[warp], sent_parity);
          float products[kSentTiles][4];
#pragma unroll
          for (int j = 0; j < kSentTiles; ++j) {
            float own[4], other[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int e = 0; e < 4; ++e) own[e] = acc[from + j][e];
            for (int source = 0; source + 1 < cut.parts; ++source) {
              const int source_part = source < part ? source : source + 1;
              const bool of_own = (source_part < cut.a_parts) == of_first;
              const float4 given = own_places[(source * kSentTiles + j) * kWarp + lane];
              const float values[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                own[e] += of_own ? values[e] : 0.f;
                other[e] += of_own ? 0.f : values[e];
              }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) products[j][e] = own[e] * other[e];
          }
          __syncwarp();
          sink.add(task, task.row + row_block * Traits::kM + 16 * warp, task.col + 8 * from,
                   products, own_places);
          __syncwarp();
          for (int source = lane; source + 1 < cut.parts; source += kWarp) {
            const int source_part = source < part ? source : source + 1;
            barrier_arrive_at(&barriers->taken[warp], source_part * Traits::kRowBlocks + row_block);
          }
        }
        sent_parity ^= 1;
      };
      exchange(std::integral_constant<int, 0>{});
      if constexpr (kColTiles > kSentTiles) exchange(std::integral_constant<int, kSentTiles>{});
    }
    if (part == owner) sink.end();
  }

  // Nobody leaves while others may still write to its memory.
  __device__ __forceinline__ void leave() const {
    __syncwarp();
    cluster_sync();
  }

 private:
  __device__ __forceinline__ void multiply(const GramTask& task, Ring& slab_at,
                                           float (&acc)[Traits::kN / 8][4]) const {
    const int warp = threadIdx.x / kWarp;
    int before = -1;  // the stage whose products are in flight
    for (int slab = first_slab; slab < last_slab; ++slab) {
      barrier_wait(&barriers->full[slab_at.index], slab_at.parity);
      const unsigned char* x = stages + slab_at.index * Traits::kStage;
      const unsigned char* y = x + Traits::kPanelX;
      if (task.same) x = y + row_block * Traits::kPanelX;
      const uint64_t left = describe_tile<false>(x + warp / 4 * 64 * 128, 0);
      const uint64_t right = describe_tile<false>(y, 0);
      warpgroup_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 features are 32 bytes
        warpgroup_multiply_add<typename Traits::T, false>(acc, left + 2 * k, right + 2 * k);
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

  // The stage may be overwritten, as far as this warp is concerned.
  __device__ __forceinline__ void give_back(int stage) const {
    if (threadIdx.x % kWarp != 0) return;
    if constexpr (Traits::kRowBlocks == 1) {
      barrier_arrive(&barriers->empty[stage]);
    } else {
      barrier_arrive_at(&barriers->empty[stage], part * Traits::kRowBlocks);
      barrier_arrive_at(&barriers->empty[stage], part * Traits::kRowBlocks + 1);
    }
  }
};

}  // namespace geffect_fast

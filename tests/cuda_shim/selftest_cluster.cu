// Two blocks that share their shared memory, and the copy engine's boxes, right and with one line
// left out.
#include "cuda/clusters.cuh"
#include "cuda/copy_engine.cuh"
#include "cuda/tensor_map.cuh"
#include "selftest.cuh"

namespace geffect_fast {
namespace {

enum class Without : int { kNothing, kInit, kExpect, kWait, kArrive };

constexpr int kRows = 8, kBox = kRows * 128, kBlocks = 2;

// out (kBlocks, 17, 64): each block's copy of x (16, 64), in two boxes; the last row holds the
// values that the other block's threads sent.
template <Without kWithout>
__global__ void __launch_bounds__(kThreads) cluster_kernel(const CUtensorMap x, float* out) {
  unsigned char* const tiles = dynamic_shared();
  auto* const sent = reinterpret_cast<float4*>(tiles + kBlocks * kBox);
  auto* const barriers = reinterpret_cast<Barrier*>(sent + kThreads);
  const int rank = cluster_rank(), t = threadIdx.x;
  if (t == 0 && kWithout != Without::kInit) {
    barrier_init(&barriers[0], 1);
    barrier_init(&barriers[1], kThreads);
    publish_barriers();
  }
  wait_for_previous_kernel();
  cluster_sync();
  if (t == 0) {
    if (kWithout == Without::kExpect) {
      barrier_arrive(&barriers[0]);
    } else {
      barrier_expect(&barriers[0], kBlocks * kBox);
    }
    for (int box = 0; box < 2; ++box) {
      copy_box(tiles + box * kBox, &x, box * kRows, 0, &barriers[0]);
    }
  }
  if (kWithout != Without::kWait) barrier_wait(&barriers[0], 0);
  float* const own = out + rank * 17 * kThreads + t;
  for (int row = 0; row < kBlocks * kRows; ++row) {
    const auto* at = tiles + row * 128 + (t / 8 ^ row % 8) * 16 + t % 8 * 2;
    own[row * kThreads] = static_cast<float>(*reinterpret_cast<const BFloat16*>(at));
  }
  store_at(sent + t, 1 - rank, make_float4(100.f * rank + t, 0.f, 0.f, 0.f));
  if (kWithout != Without::kArrive) barrier_arrive_at(&barriers[1], 1 - rank);
  barrier_wait(&barriers[1], 0);
  own[16 * kThreads] = sent[kThreads - 1 - t].x;
  cluster_sync();
}

template <Without kWithout>
Tensor cluster(const Tensor& x) {
  const Tensor out = new_float(x, {kBlocks, 17, kThreads});
  const auto kernel = cluster_kernel<kWithout>;
  const Clusters clusters{reinterpret_cast<const void*>(kernel), kThreads, kBlocks,
                          kBlocks * kBox + kThreads * sizeof(float4) + 2 * sizeof(Barrier)};
  clusters.launch(Device(x), 1, kernel, describe_matrix<BFloat16>(x, kRows),
                  out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY_IMPL(cuda_shim_selftest, CPU, m) {
  using geffect_fast::cluster;
  using geffect_fast::Without;
  m.impl("cluster", TORCH_BOX(&cluster<Without::kNothing>));
  m.impl("cluster_init", TORCH_BOX(&cluster<Without::kInit>));
  m.impl("cluster_expect", TORCH_BOX(&cluster<Without::kExpect>));
  m.impl("cluster_wait", TORCH_BOX(&cluster<Without::kWait>));
  m.impl("cluster_arrive", TORCH_BOX(&cluster<Without::kArrive>));
}

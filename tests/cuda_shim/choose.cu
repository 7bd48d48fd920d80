// The rules of csrc/cuda/choose.h as ops of test_cuda_choice.py.
#include "cuda/choose.h"
#include "cuda/tile_product.cuh"

namespace geffect_fast {
namespace {

// sizes (cases, 9): capability, multiprocessors, whether elements have tensor cores, whether
// gradients serve, tokens, segments, d_in, d_out, directions -> (cases,) of BilinearForm.
Tensor bilinear_forms(const Tensor& sizes) {
  const int64_t n = sizes.size(0);
  const Tensor out = torch::stable::new_empty(sizes, {n});
  const int64_t* from = sizes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i, from += 9) {
    const BilinearDevice device{static_cast<int>(from[0]), static_cast<int>(from[1])};
    out.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(bilinear_form_by_cost(
        device, from[2] != 0, from[3] != 0, {from[4], from[5], from[6], from[7], from[8]}));
  }
  return out;
}

// The same sizes -> (cases, 4) whole microseconds by BilinearForm.
Tensor bilinear_costs(const Tensor& sizes) {
  const int64_t n = sizes.size(0);
  const Tensor out = torch::stable::new_empty(sizes, {n, 4});
  const int64_t* from = sizes.const_data_ptr<int64_t>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i, from += 9) {
    const BilinearCosts costs({from[4], from[5], from[6], from[7], from[8]},
                              static_cast<int>(from[1]));
    for (double cost : {costs.fused, costs.hopper, costs.cublas, costs.gradient}) {
      *to++ = static_cast<int64_t>(cost);
    }
  }
  return out;
}

// sizes (cases, 4): tokens, segments of one length, d_in, d_out, of 16-bit elements on Hopper ->
// (cases,) of GhostForm, never kByCost.
Tensor ghost_norm_forms(const Tensor& sizes) {
  const int64_t n = sizes.size(0);
  const Tensor out = torch::stable::new_empty(sizes, {n});
  const int64_t* from = sizes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i, from += 4) {
    const int64_t tokens = from[0], segments = from[1];
    const bool by_clusters = grams_by_clusters(tokens, segments);
    const bool large = !by_clusters && by_large_tiles(tokens, segments);
    const GhostSizes ghost{from[2],
                           from[3],
                           large ? kLargeGramTile : kSmallGramTile,
                           kTileSide<BFloat16>,
                           SmallTile<BFloat16>::kK,
                           GhostForm::kByCost};
    const GhostForm form = !gram_form_is_cheaper(tokens / segments, ghost) ? GhostForm::kGradient
                           : by_clusters                                   ? GhostForm::kClusters
                                                                           : GhostForm::kGram;
    out.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(form);
  }
  return out;
}

}  // namespace
}  // namespace geffect_fast

STABLE_TORCH_LIBRARY(cuda_shim_choose, m) {
  m.def("bilinear_forms(Tensor sizes) -> Tensor");
  m.def("bilinear_costs(Tensor sizes) -> Tensor");
  m.def("ghost_norm_forms(Tensor sizes) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(cuda_shim_choose, CPU, m) {
  m.impl("bilinear_forms", TORCH_BOX(&geffect_fast::bilinear_forms));
  m.impl("bilinear_costs", TORCH_BOX(&geffect_fast::bilinear_costs));
  m.impl("ghost_norm_forms", TORCH_BOX(&geffect_fast::ghost_norm_forms));
}

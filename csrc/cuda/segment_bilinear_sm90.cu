// segment_bilinear_terms_sm90: terms[tile, m, t] = sum_{o in tile} g[t, o] (A V_m^T)[t, o]
//
// a (total_tokens, d_in), g (total_tokens, d_out), v (M, d_out, d_in), bf16 or fp16
//   -> (tiles of d_out, M, total_tokens) fp32, a view; of first size 0 where the arguments do not
//      fit the copy engine (rows on 16 bytes, d_in and d_out multiples of 8).
//
// A Hopper GEMM of CUTLASS's parts: a producer warp brings tiles of A, V and G by TMA, two
// warpgroups of consumers multiply with wgmma, and the epilogue multiplies the accumulators by G
// and adds them along d_out in registers. Each block leaves one column of partial sums, so Z = A
// V^T never leaves the registers and no sum depends on the order of blocks. Limiter: arithmetic.
//
// Compiled for sm_90a alone and kept in a library of its own; segment_bilinear.cu asks for it
// through the dispatcher. 168 registers, no spills.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "common/checks.h"
#include "cuda/device.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/vector.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_bilinear_terms_sm90";

template <class T>
using cutlass_t = std::conditional_t<std::is_same_v<T, Half>, cutlass::half_t, cutlass::bfloat16_t>;

using TileShape = cute::Shape<cute::_128, cute::_256, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
constexpr int kTileTokens = 128, kTileOut = 256;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// The sums along a tile's rows, in registers, by shuffles and through shared memory. The last
// argument: what a block has goes to a place of its own, to be added later in a fixed order.
using RowSumBase = cutlass::epilogue::fusion::Sm90ColReduction<
    cutlass::plus, cutlass::plus, cutlass::plus, 0, TileShape, float, float, kRound,
    cute::Stride<cute::_1, cute::_0, cute::_0>, 4, true, false>;
template <class Element>
struct RowSum : RowSumBase {
  using RowSumBase::RowSumBase;
  using ElementAux = Element;  // the epilogue without an output matrix takes its type from here
};

template <class T>
struct HopperTraits {
  using Element = cutlass_t<T>;
  static constexpr int kAlignment = kVector<T>;
  using Fusion = cutlass::epilogue::fusion::Sm90EVT<
      RowSum<Element>,
      cutlass::epilogue::fusion::Sm90EVT<
          cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>,
          cutlass::epilogue::fusion::Sm90AccFetch,
          cutlass::epilogue::fusion::Sm90SrcFetch<Element>>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element,
      cutlass::layout::RowMajor, kAlignment, void, cutlass::layout::RowMajor, kAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
      kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

void check_status(cutlass::Status status) {
  STD_TORCH_CHECK(status == cutlass::Status::kSuccess, kOp, ": ",
                  cutlass::cutlassGetStatusString(status));
}

template <class T>
Tensor terms_typed(const Tensor& a, const Tensor& g, const Tensor& v) {
  using Traits = HopperTraits<T>;
  using Element = typename Traits::Element;
  using Gemm = typename Traits::Gemm;
  const int64_t total_tokens = a.size(0), n_directions = v.size(0);
  const bool whole_vectors = a.size(1) % kVector<T> == 0 && g.size(1) % kVector<T> == 0;
  if (!whole_vectors || !fits_copy_engine<T>(a) || !fits_copy_engine<T>(g) ||
      !fits_copy_engine<T>(v)) {
    return new_float(a, {0, n_directions, total_tokens});
  }
  const Device device(a);
  const int64_t o_tiles = ceil_div(g.size(1), kTileOut);
  const int64_t padded = ceil_div(total_tokens, kTileTokens) * kTileTokens;
  const Tensor memory = new_float(a, {n_directions, o_tiles, padded});
  const auto* directions = static_cast<const Element*>(v.const_data_ptr());

  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(total_tokens), static_cast<int>(g.size(1)),
                             static_cast<int>(a.size(1)), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(a.const_data_ptr());
  arguments.mainloop.dA = {a.stride(0), cute::_1{}, 0};
  arguments.mainloop.dB = {v.stride(1), cute::_1{}, 0};
  arguments.epilogue.ptr_C = static_cast<const Element*>(g.const_data_ptr());
  arguments.epilogue.dC = {g.stride(0), cute::_1{}, 0};
  arguments.hw_info.sm_count = device.n_multiprocessors();
  for (int64_t m = 0; m < n_directions; ++m) {
    arguments.mainloop.ptr_B = directions + m * v.stride(0);
    arguments.epilogue.thread = {
        {{}, {}, {}},
        {memory.mutable_data_ptr<float>() + m * o_tiles * padded, 0.f, {}},
    };
    check_status(Gemm::can_implement(arguments));
    const Tensor workspace = torch::stable::new_empty(
        a, {static_cast<int64_t>(Gemm::get_workspace_size(arguments))}, ScalarType::Byte);
    Gemm gemm;
    check_status(gemm.initialize(arguments, workspace.mutable_data_ptr(), device.stream()));
    check_status(gemm.run(device.stream()));
  }
  Tensor terms = torch::stable::transpose(memory, 0, 1);
  return torch::stable::narrow(terms, 2, 0, total_tokens);
}

// The caller, segment_bilinear, has checked the arguments.
Tensor segment_bilinear_terms_sm90(const Tensor& a, const Tensor& g, const Tensor& v) {
  switch (a.scalar_type()) {
    case ScalarType::BFloat16:
      return terms_typed<BFloat16>(a, g, v);
    case ScalarType::Half:
      return terms_typed<Half>(a, g, v);
    default:
      return new_float(a, {0, v.size(0), a.size(0)});
  }
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(segment_bilinear_terms_sm90)

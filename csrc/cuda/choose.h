// Which of several exact forms serves a call: small rules of sizes, all in one place.
//
// The constants are predictions from operation and byte counts until a benchmark has set them;
// benchmarks/bench_gpu.py times every form (GEFFECT_FAST_GHOST_FORM, GEFFECT_FAST_BILINEAR_FORM).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/dtype.h"

namespace geffect_fast {

// The value of an environment variable that forces a form; empty where it is not set.
inline std::string_view forced_form(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

// kClusters: Gram tiles by clusters of blocks (gram_tiles_sm90.cuh), where sm_90a has code for
// them.
enum class GhostForm : int { kByCost, kGram, kGradient, kClusters };

inline GhostForm ghost_form() {
  const std::string_view forced = forced_form("GEFFECT_FAST_GHOST_FORM");
  if (forced == "gram") return GhostForm::kGram;
  if (forced == "gradient") return GhostForm::kGradient;
  if (forced.substr(0, 8) == "clusters") return GhostForm::kClusters;
  STD_TORCH_CHECK(forced.empty(), "GEFFECT_FAST_GHOST_FORM must be gram, gradient or clusters");
  return GhostForm::kByCost;
}

// Average tokens of a segment from which on large tiles of token pairs pay.
inline constexpr int64_t kLargeTileTokens = 192;

// kFused: the product is multiplied by G in registers. kHopper: the same with CUTLASS's parts for
// sm_90a. kCublas: A V^T by cuBLAS, then the products with G. kGradient: tiles of the segments'
// gradients, each for two directions.
enum class BilinearForm { kFused, kHopper, kCublas, kGradient };

struct BilinearSizes {
  int64_t tokens, n, d_in, d_out, n_directions;
};

// `capability` is 80, 89, 90, ...; gradients give no results per token.
inline BilinearForm bilinear_form(int capability, bool tensor_cores, bool per_token,
                                  const BilinearSizes& s) {
  const bool gradients_serve = tensor_cores && !per_token && s.n > 0 && s.d_in > 0 && s.d_out > 0;
  const std::string_view forced = forced_form("GEFFECT_FAST_BILINEAR_FORM");
  if (forced == "fused") return BilinearForm::kFused;
  if (forced == "sm90") return BilinearForm::kHopper;
  if (forced == "cublas") return BilinearForm::kCublas;
  if (forced == "gradient" && gradients_serve) return BilinearForm::kGradient;
  STD_TORCH_CHECK(forced.empty() || forced == "gradient",
                  "GEFFECT_FAST_BILINEAR_FORM must be fused, sm90, cublas or gradient");
  // fp32 inputs go to cuBLAS: its fp32 GEMM is hard to beat by what the epilogue saves.
  if (!tensor_cores) return BilinearForm::kCublas;
  // Predicted: half a slab of 64 tokens a segment is padding, the products with two directions cost
  // as much as 24 tokens, and a GEMM by TMA is a quarter faster than one by cp.async.
  const double gradient_rows = s.tokens + 56.0 * s.n, passes = (s.n_directions + 1) / 2;
  if (gradients_serve && gradient_rows * passes < 0.75 * s.tokens * s.n_directions) {
    return BilinearForm::kGradient;
  }
  if (capability == 90) return BilinearForm::kHopper;
  // Predicted: m16n8k16 reaches some 80 % of cuBLAS where cuBLAS uses the same instruction, and the
  // product costs 8 bytes an element: a fifth of the GEMM's time at this d_in. sm_100 has faster
  // instructions, which only cuBLAS uses.
  const bool same_instruction = capability < 90 || capability >= 120;
  return same_instruction && s.d_in <= 2048 ? BilinearForm::kFused : BilinearForm::kCublas;
}

}  // namespace geffect_fast

// Which of several exact forms serves a call: small rules of sizes, all in one place.
//
// The constants are predictions from operation and byte counts until a benchmark has set them;
// benchmarks/bench_gpu.py times every form (GEFFECT_FAST_GHOST_FORM, GEFFECT_FAST_BILINEAR_FORM,
// GEFFECT_FAST_GRAM_FORM, GEFFECT_FAST_SUM_FORM).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "common/dtype.h"

namespace geffect_fast {

// The value of an environment variable that forces a form; empty where it is not set.
inline std::string_view forced_form(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

enum class GhostForm : int { kByCost, kGram, kGradient };

inline GhostForm ghost_form() {
  const std::string_view forced = forced_form("GEFFECT_FAST_GHOST_FORM");
  if (forced == "gram") return GhostForm::kGram;
  if (forced == "gradient") return GhostForm::kGradient;
  STD_TORCH_CHECK(forced.empty(), "GEFFECT_FAST_GHOST_FORM must be gram or gradient");
  return GhostForm::kByCost;
}

// Average tokens of a segment from which on large tiles of token pairs pay.
inline constexpr int64_t kLargeTileTokens = 192;

// Two sets of samples: their tokens and numbers, and the layer.
struct PairSizes {
  int64_t tokens, tokens2, n, n2, d_in, d_out;
};

// Whether ghost_dot makes tiles of all gradients and multiplies those, rather than all pairs of
// tokens. Products of gradients are fp32 and cost `fp32_cost` multiply-adds of the inputs' type;
// half a slab of tokens a sample is padding.
inline bool ghost_dot_by_gradients(const PairSizes& s, bool tensor_cores) {
  if (s.d_in == 0 || s.d_out == 0) return false;
  if (const GhostForm form = ghost_form(); form != GhostForm::kByCost) {
    return form == GhostForm::kGradient;
  }
  const double fp32_cost = tensor_cores ? 12 : 1, padding = tensor_cores ? 32 : 16;
  const double layer = static_cast<double>(s.d_in) * s.d_out;
  const double tokens = static_cast<double>(s.tokens) + s.tokens2 + padding * (s.n + s.n2);
  const double gradients = (tokens + fp32_cost * s.n * s.n2) * layer;
  return gradients < static_cast<double>(s.tokens) * s.tokens2 * (s.d_in + s.d_out);
}

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

// Whether the form `other` serves where there is a usual one and `variable` may name either.
inline bool is_other_form(const char* variable, std::string_view usual, std::string_view other) {
  const std::string_view forced = forced_form(variable);
  STD_TORCH_CHECK(forced.empty() || forced == usual || forced == other, variable, " must be ",
                  std::string(usual), " or ", std::string(other));
  return forced == other;
}

// Whether multi_tensor_gram copies 5 to 16 lists of 16-bit elements to shared memory. No device has
// measured that yet.
inline bool gram_is_staged() {
  return is_other_form("GEFFECT_FAST_GRAM_FORM", "registers", "staged");
}

// Whether second stages load the terms of several slices at once. No device has measured that yet.
inline bool sums_slices_at_once() {
  return is_other_form("GEFFECT_FAST_SUM_FORM", "slices", "at_once");
}

}  // namespace geffect_fast

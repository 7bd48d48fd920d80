// The choice between several exact forms for a call: small rules of sizes, all in one place.
//
// Rules predict the cost of every form from counts of operations and bytes, at rates that were
// measured: benchmarks/bench_gpu.py times every form (GEFFECT_FAST_GHOST_FORM,
// GEFFECT_FAST_BILINEAR_FORM), and tests/ops/test_cuda_choice.py compares the rules with its
// results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "cuda/device.cuh"

namespace geffect_fast {

// The value of an environment variable that forces a form; empty where it is not set.
inline std::string_view forced_form(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

// kClusters: Gram tiles by clusters of blocks (ghost_norm_sm90.cu), where sm_90a has code for them.
enum class GhostForm : int { kByCost, kGram, kGradient, kClusters };

inline GhostForm ghost_form() {
  const std::string_view forced = forced_form("GEFFECT_FAST_GHOST_FORM");
  if (forced == "gram") return GhostForm::kGram;
  if (forced == "gradient") return GhostForm::kGradient;
  if (forced == "clusters") return GhostForm::kClusters;
  STD_TORCH_CHECK(forced.empty(), "GEFFECT_FAST_GHOST_FORM must be gram, gradient or clusters");
  return GhostForm::kByCost;
}

// Tokens along a tile of token pairs, and whether the large ones pay for n segments with `tokens`
// in all.
inline constexpr int kSmallGramTile = 64, kLargeGramTile = 128;
inline bool by_large_tiles(int64_t tokens, int64_t n) { return tokens >= 192 * n; }

// The sizes that choose between the Gram and the gradient of a segment in ghost_norm: the layer,
// tokens along a tile of pairs, features along a tile of a gradient, tokens that such a tile takes
// at once.
struct GhostSizes {
  int64_t d_in, d_out;
  int gram_tile, gradient_tile, slab_tokens;
  GhostForm form;
};

__host__ __device__ constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// By the multiply-adds of whole tiles.
__host__ __device__ inline bool gram_form_is_cheaper(int64_t tokens, const GhostSizes& sizes) {
  if (sizes.form != GhostForm::kByCost) return sizes.form != GhostForm::kGradient;
  const auto round_up = [](int64_t a, int64_t b) { return ceil_div(a, b) * b; };
  const int64_t tile = sizes.gram_tile;
  const double gram = static_cast<double>(triangle(ceil_div(tokens, tile))) * tile * tile *
                      (sizes.d_in + sizes.d_out);
  return gram <= static_cast<double>(round_up(tokens, sizes.slab_tokens)) *
                     round_up(sizes.d_in, sizes.gradient_tile) *
                     round_up(sizes.d_out, sizes.gradient_tile);
}

// Whether ghost_norm's Grams are made by clusters, of n segments with `tokens` in all. Measured on
// an H100: 0.74 to 0.93 of the other tiles' time at 64 tokens each, 1.35 to 2 times it at 256.
inline bool grams_by_clusters(int64_t tokens, int64_t n) {
  constexpr int64_t kShortSegment = 96;
  const GhostForm form = ghost_form();
  return form == GhostForm::kClusters ||
         (form == GhostForm::kByCost && tokens <= kShortSegment * n);
}

// The number of parts into which clusters cut the features, and the number of parts of a.
struct FeatureParts {
  int64_t parts, a_parts;
};

// The cut with the least time for one tile a segment. The time is that of whole rounds of the
// clusters that the device holds, each as long as its block with the most features, and of sending
// the sums to the blocks that collect them.
inline FeatureParts feature_parts(int64_t n, int64_t d_in, int64_t d_out, int n_multiprocessors) {
  // Predicted, in the time of 64 features: the wait for the first copies, and one more part's sums.
  constexpr double kStart = 4, kSend = 2;
  constexpr int64_t kBlocksPerSm = 2;
  FeatureParts best{};
  double least = 0;
  for (int64_t parts : {2, 4}) {
    const int64_t clusters = std::max<int64_t>(1, kBlocksPerSm * n_multiprocessors / parts);
    const int64_t rounds = (n + clusters - 1) / clusters;
    for (int64_t a_parts = 1; a_parts < parts; ++a_parts) {
      const double features = std::max(static_cast<double>(d_in) / a_parts,
                                       static_cast<double>(d_out) / (parts - a_parts));
      const double time = rounds * (features / 64 + kStart + kSend * (parts - 1));
      if (best.parts == 0 || time < least) {
        least = time;
        best = {parts, a_parts};
      }
    }
  }
  return best;
}

// kFused: the product is multiplied by G in registers. kHopper: the same with CUTLASS's parts for
// sm_90a. kCublas: A V^T by cuBLAS, then the products with G. kGradient: tiles of the segments'
// gradients, each for two directions.
enum class BilinearForm { kFused, kHopper, kCublas, kGradient };

struct BilinearSizes {
  int64_t tokens, n, d_in, d_out, n_directions;
};

// The facts beside the sizes that choose between forms of segment_bilinear. `capability` is 80, 89,
// 90, ...
struct BilinearDevice {
  int capability, n_multiprocessors;
};

// Microseconds on an H100 (NVIDIA H100 80GB HBM3, 16-bit elements); products are multiply-adds.
struct BilinearCosts {
  double fused, hopper, cublas, gradient;

  BilinearCosts(const BilinearSizes& s, int n_multiprocessors) {
    constexpr double kLaunches = 10, kBytes = 3e6;
    const auto upwards = [](int64_t a, int64_t b) { return static_cast<double>((a + b - 1) / b); };
    const double m = static_cast<double>(s.n_directions), tokens = static_cast<double>(s.tokens);
    const double layer = static_cast<double>(s.d_in) * s.d_out, results = tokens * s.d_out;
    // All directions in one launch.
    fused = 23 + m * tokens * layer / 2.05e8;
    // A launch for each direction, of tiles of 128 x 256, one on a multiprocessor: a layer with few
    // of them leaves some idle. Their order does not reuse the second-level cache well where both
    // sides are long.
    const double waves = std::ceil(upwards(s.tokens, 128) * upwards(s.d_out, 256) /
                                   static_cast<double>(n_multiprocessors));
    const double reuse = results < 4e8 ? 1.1 : 1.4;
    hopper = kLaunches + m * waves * reuse * (5 + 0.01 * static_cast<double>(s.d_in));
    // A V^T is written and read in fp32, beside G, by a kernel of its own.
    cublas = kLaunches + m * (6 + tokens * layer / 3.4e8 + 10 * results / kBytes);
    // Two directions share a launch. A segment costs as much as 166 tokens more: slabs that are not
    // full, a pipeline that has to fill, the products with the directions.
    const double rows = tokens + 166 * static_cast<double>(s.n);
    gradient = kLaunches + std::ceil(m / 2) * (25 + rows * layer / 2.44e8);
  }
};

// The form by sizes alone; `gradients_serve` where the op has a result a segment.
inline BilinearForm bilinear_form_by_cost(const BilinearDevice& device, bool tensor_cores,
                                          bool gradients_serve, const BilinearSizes& s) {
  // cuBLAS is 1.35 times as fast for fp32.
  if (!tensor_cores) return BilinearForm::kCublas;
  if (device.capability == 90) {
    const BilinearCosts costs(s, device.n_multiprocessors);
    const double least = std::min({costs.fused, costs.hopper, costs.cublas});
    if (gradients_serve && costs.gradient < least) return BilinearForm::kGradient;
    if (costs.hopper <= least) return BilinearForm::kHopper;
    return costs.cublas <= least ? BilinearForm::kCublas : BilinearForm::kFused;
  }
  // Other devices have not been measured. Predicted: half a slab of 64 tokens a segment is padding,
  // and the products with two directions cost as much as 24 tokens.
  const double gradient_rows = s.tokens + 56.0 * s.n, passes = (s.n_directions + 1) / 2;
  if (gradients_serve && gradient_rows * passes < 0.75 * s.tokens * s.n_directions) {
    return BilinearForm::kGradient;
  }
  // Predicted: m16n8k16 reaches some 80 % of cuBLAS where cuBLAS uses the same instruction, and the
  // product costs 8 bytes an element: a fifth of the GEMM's time at this d_in. sm_100 has faster
  // instructions, which only cuBLAS uses.
  const bool same_instruction = device.capability < 90 || device.capability >= 120;
  return same_instruction && s.d_in <= 2048 ? BilinearForm::kFused : BilinearForm::kCublas;
}

// Gradients give no results per token; fp32 has the form of cuBLAS alone.
inline BilinearForm bilinear_form(const BilinearDevice& device, bool tensor_cores, bool per_token,
                                  const BilinearSizes& s) {
  const bool gradients_serve = tensor_cores && !per_token && s.n > 0 && s.d_in > 0 && s.d_out > 0;
  const std::string_view forced = forced_form("GEFFECT_FAST_BILINEAR_FORM");
  STD_TORCH_CHECK(forced.empty() || forced == "fused" || forced == "sm90" || forced == "cublas" ||
                      forced == "gradient",
                  "GEFFECT_FAST_BILINEAR_FORM must be fused, sm90, cublas or gradient");
  if (forced == "fused" && tensor_cores) return BilinearForm::kFused;
  if (forced == "sm90") return BilinearForm::kHopper;
  if (forced == "cublas") return BilinearForm::kCublas;
  if (forced == "gradient" && gradients_serve) return BilinearForm::kGradient;
  return bilinear_form_by_cost(device, tensor_cores, gradients_serve, s);
}

}  // namespace geffect_fast

// How the tiles of Grams are cut for clusters of blocks (gram_tiles_sm90.cuh): rules of sizes.
//
// Not yet run on a GPU: the constants are predicted from counts of bytes and operations.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/choose.h"

namespace geffect_fast {

// Tiles of `tile` x `tile` tokens, the features of both Grams in `parts` ranges, `a_parts` of them
// of a, and the slabs of 64 features that are copied ahead.
struct GramTiling {
  int64_t tile, parts, a_parts, stages;
};

// The tile that GEFFECT_FAST_GHOST_FORM asks for (clusters64, clusters128, clusters256), 0 where it
// leaves the choice.
inline int64_t forced_tile() {
  const std::string_view form = forced_form("GEFFECT_FAST_GHOST_FORM");
  if (form == "clusters64") return 64;
  if (form == "clusters128") return 128;
  return form == "clusters256" ? 256 : 0;
}

// The cut by which `tiles` tiles end first: whole rounds of the clusters that the device holds,
// each as long as its block with the most features, and the sums' way to the blocks that collect
// them.
inline GramTiling fastest_cut(int64_t tile, int64_t tiles, int64_t d_in, int64_t d_out,
                              int64_t n_multiprocessors) {
  // Predicted, in the time of a slab: waiting for the first copies, and what another part sends.
  constexpr double kStart = 4, kSend = 2;
  const int64_t blocks_of_part = tile == 256 ? 2 : 1, blocks_per_sm = tile == 64 ? 2 : 1;
  const int64_t most_parts = tile == 128 ? 8 : 4;
  GramTiling best{};
  double least = 0;
  for (int64_t parts = 2; parts <= most_parts; parts *= 2) {
    const int64_t clusters =
        std::max<int64_t>(1, blocks_per_sm * n_multiprocessors / (parts * blocks_of_part));
    const int64_t rounds = (tiles + clusters - 1) / clusters;
    for (int64_t a_parts = 1; a_parts < parts; ++a_parts) {
      const double features = std::max(static_cast<double>(d_in) / a_parts,
                                       static_cast<double>(d_out) / (parts - a_parts));
      const double time = rounds * (features / 64 + kStart + kSend * (parts - 1));
      if (best.parts == 0 || time < least) {
        least = time;
        best = {tile, parts, a_parts, 0};
      }
    }
  }
  // What shared memory holds beside the places for the other parts' sums.
  best.stages = tile == 64 ? 6 : tile == 128 ? 5 : best.parts == 2 ? 4 : 3;
  return best;
}

// For ghost_norm of n segments with `total` tokens; the host knows their average length alone.
inline GramTiling norm_tiling(int64_t total, int64_t n, int64_t d_in, int64_t d_out,
                              int64_t n_multiprocessors) {
  const int64_t average = std::max<int64_t>(1, total / std::max<int64_t>(1, n));
  int64_t tile = forced_tile();
  if (tile == 0) tile = average <= 96 ? 64 : average <= 512 ? 128 : 256;
  const int64_t side = (average + tile - 1) / tile;
  return fastest_cut(tile, n * side * (side + 1) / 2, d_in, d_out, n_multiprocessors);
}

// For ghost_dot of `rows` and `cols` tokens.
inline GramTiling pair_tiling(int64_t rows, int64_t cols, int64_t d_in, int64_t d_out,
                              int64_t n_multiprocessors) {
  const auto tiles_of = [&](int64_t tile) {
    return ((rows + tile - 1) / tile) * ((cols + tile - 1) / tile);
  };
  int64_t tile = std::max<int64_t>(forced_tile(), 128 * (forced_tile() > 0));
  if (tile == 0) tile = 4 * tiles_of(256) >= n_multiprocessors ? 256 : 128;
  return fastest_cut(tile, tiles_of(tile), d_in, d_out, n_multiprocessors);
}

}  // namespace geffect_fast

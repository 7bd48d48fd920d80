// The pairs of tokens whose products ghost_dot_pairs_sm90 adds up at once.
#pragma once

namespace geffect_fast {

inline constexpr int kSumRows = 16, kSumCols = 128;

}  // namespace geffect_fast

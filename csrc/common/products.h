// The two blocked products of layer inputs A and output gradients G that make up the ghost ops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/blocks.h"

namespace geffect_fast {

// The size of a tile of a weight gradient, and the tokens multiplied at once. Measured: a tile
// takes half of the second-level cache, as BLAS packs the inputs anew for every tile, and its rows
// are long enough for the dots.
inline constexpr int64_t kTileOut = 256;
inline constexpr int64_t kTileIn = 512;
inline constexpr int64_t kInnerTokens = 1024;
inline constexpr int64_t kTileScratch = kInnerTokens * (kTileOut + kTileIn);

// The corner and size of a tile.
struct Tile {
  int64_t out, rows, in, cols;

  int64_t size() const { return rows * cols; }
};

// The tile of a (d_out, d_in) matrix that begins at (out, in), of at most `rows` rows.
inline Tile tile_at(int64_t out, int64_t in, int64_t d_out, int64_t d_in, int64_t rows = kTileOut) {
  return {out, std::min(rows, d_out - out), in, std::min(kTileIn, d_in - in)};
}

// result (rows x cols) = sum over tokens [begin, end) of g_t a_t^T within the tile, 0 without
// tokens; `scratch` holds kInnerTokens * (tile.rows + tile.cols).
template <class T>
void gradient_tile(acc_t<T>* result, const Matrix<T>& a, const Matrix<T>& g, int64_t begin,
                   int64_t end, const Tile& tile, acc_t<T>* scratch) {
  if (begin == end) std::fill(result, result + tile.size(), acc_t<T>{0});
  for (int64_t t = begin; t < end; t += kInnerTokens) {
    const int64_t tokens = std::min(kInnerTokens, end - t);
    const auto g_block = dense_block(g, t, tokens, tile.out, tile.rows, scratch);
    const auto a_block =
        dense_block(a, t, tokens, tile.in, tile.cols, scratch + kInnerTokens * tile.rows);
    gemm(result, g_block, Transpose::kYes, a_block, Transpose::kNo, t > begin);
  }
}

// Features multiplied at once in a token Gram.
inline constexpr int64_t kFeatures = 2048;

// result (rows x cols) = or += inner products of x's rows from `row` with y's rows from `col`, at
// least the `part` of them; `scratch` holds (rows + cols) * kFeatures.
template <class T>
void token_gram(acc_t<T>* result, const Matrix<T>& x, int64_t row, int64_t rows, const Matrix<T>& y,
                int64_t col, int64_t cols, acc_t<T>* scratch, bool accumulate = false,
                Part part = Part::kAll) {
  for (int64_t f = 0; f < x.cols; f += kFeatures) {
    const int64_t features = std::min(kFeatures, x.cols - f);
    const auto left = dense_block(x, row, rows, f, features, scratch);
    const auto right = dense_block(y, col, cols, f, features, scratch + rows * features);
    gemm(result, left, Transpose::kNo, right, Transpose::kYes, accumulate || f > 0, part);
  }
}

}  // namespace geffect_fast

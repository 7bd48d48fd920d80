// fp32 products of blocks on AMD processors: somewhat faster than MKL's there, and a kernel uses a
// product before the product leaves the registers.
//
// The usual scheme (Goto and van de Geijn, doi 10.1145/1356052.1356053): y is packed into panels as
// wide as a block of the result in registers, so that a step along the depth reads one row of a
// panel; a few rows of x times a panel make such a block. Rows of x that lie along the depth are
// read where they are, others are packed as well.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "common/blocks.h"
#include "common/instructions.h"
#include "common/tasks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define GEFFECT_FAST_AVX2 __attribute__((target("avx2,fma")))
#define GEFFECT_FAST_AVX512 __attribute__((target("avx512f")))
#endif

#define GEFFECT_FAST_INLINE inline __attribute__((always_inline))

namespace geffect_fast {

#if defined(__x86_64__)
namespace {

// The part of y packed at once: half of the second-level cache of a Zen 4 core.
constexpr int64_t kDepth = 384;
constexpr int64_t kColumns = 512;

// The rows of x packed at once, where they are packed: a multiple of every kernel's rows.
constexpr int64_t kRowsAtOnce = 128;

template <int kBytes>
using Vec __attribute__((vector_size(kBytes))) = float;
template <int kBytes>
using UnalignedVec __attribute__((vector_size(kBytes), aligned(alignof(float)), may_alias)) = float;

// A block of the result in registers: kRows x (kVectors vectors of kBytes).
template <int kBytes, int kRows, int kVectors>
struct Shape {
  static constexpr int kHeight = kRows;
  static constexpr int kLanes = kBytes / sizeof(float);
  static constexpr int kWidth = kVectors * kLanes;

  using Sums = Vec<kBytes>[kRows][kVectors];

  // sum = x y over `depth`: x[i][k] at x[i * ldx + k], or packed at x[k * kRows + i]; y[k][j] at
  // y[k * kWidth + j].
  template <bool kPackedRows>
  static GEFFECT_FAST_INLINE void multiply(const float* x, int64_t ldx, const float* y,
                                           int64_t depth, Sums& sum) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec<kBytes> ys[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        ys[j] = *reinterpret_cast<const Vec<kBytes>*>(y + k * kWidth + j * kLanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const float xs = kPackedRows ? x[k * kRows + i] : x[i * ldx + k];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] += xs * ys[j];
      }
    }
  }

  // out (kRows x kWidth, rows ldo apart) = or += x y.
  template <bool kPackedRows>
  static GEFFECT_FAST_INLINE void product(const float* x, int64_t ldx, const float* y,
                                          int64_t depth, float* out, int64_t ldo, bool accumulate) {
    Sums sum = {};
    multiply<kPackedRows>(x, ldx, y, depth, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* at = out + i * ldo + j * kLanes;
        if (accumulate) sum[i][j] += *reinterpret_cast<const UnalignedVec<kBytes>*>(at);
        *reinterpret_cast<UnalignedVec<kBytes>*>(at) = sum[i][j];
      }
    }
  }

  // lanes (kRows x kLanes) += x y times z (rows ldz apart), its columns added up by lane.
  template <bool kPackedRows>
  static GEFFECT_FAST_INLINE void dots(const float* x, int64_t ldx, const float* y, int64_t depth,
                                       const float* z, int64_t ldz, float* lanes) {
    Sums sum = {};
    multiply<kPackedRows>(x, ldx, y, depth, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      auto* total = reinterpret_cast<Vec<kBytes>*>(lanes + i * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        *total +=
            sum[i][j] * *reinterpret_cast<const UnalignedVec<kBytes>*>(z + i * ldz + j * kLanes);
      }
    }
  }
};

using Avx2 = Shape<32, 4, 3>;
using Avx512 = Shape<64, 8, 2>;
constexpr int64_t kQuad = 4;  // divides every kernel's rows and width
constexpr int kMostRows = 8, kWidest = 32, kMostLanes = 16;

using Product = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
using Dots = void (*)(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*);

template <bool kPackedRows>
GEFFECT_FAST_AVX2 void product_avx2(const float* x, int64_t ldx, const float* y, int64_t depth,
                                    float* out, int64_t ldo, bool accumulate) {
  Avx2::product<kPackedRows>(x, ldx, y, depth, out, ldo, accumulate);
}
template <bool kPackedRows>
GEFFECT_FAST_AVX2 void dots_avx2(const float* x, int64_t ldx, const float* y, int64_t depth,
                                 const float* z, int64_t ldz, float* lanes) {
  Avx2::dots<kPackedRows>(x, ldx, y, depth, z, ldz, lanes);
}
template <bool kPackedRows>
GEFFECT_FAST_AVX512 void product_avx512(const float* x, int64_t ldx, const float* y, int64_t depth,
                                        float* out, int64_t ldo, bool accumulate) {
  Avx512::product<kPackedRows>(x, ldx, y, depth, out, ldo, accumulate);
}
template <bool kPackedRows>
GEFFECT_FAST_AVX512 void dots_avx512(const float* x, int64_t ldx, const float* y, int64_t depth,
                                     const float* z, int64_t ldz, float* lanes) {
  Avx512::dots<kPackedRows>(x, ldx, y, depth, z, ldz, lanes);
}

struct Kernel {
  int64_t rows, width, lanes;
  Product product, packed_product;
  Dots dots, packed_dots;
};

const Kernel* kernel() {
  static constexpr Kernel avx2 = {Avx2::kHeight,       Avx2::kWidth,       Avx2::kLanes,
                                  product_avx2<false>, product_avx2<true>, dots_avx2<false>,
                                  dots_avx2<true>};
  static constexpr Kernel avx512 = {Avx512::kHeight,       Avx512::kWidth,       Avx512::kLanes,
                                    product_avx512<false>, product_avx512<true>, dots_avx512<false>,
                                    dots_avx512<true>};
  if (!__builtin_cpu_is("amd")) return nullptr;
  switch (instructions()) {
    case Instructions::kAvx512:
      return &avx512;
    case Instructions::kAvx2:
      return &avx2;
    default:
      return nullptr;
  }
}

const Kernel* const kKernel = kernel();

// dst[k * ldd + j] = src[j * lds + k] for 8 x 8 elements.
GEFFECT_FAST_AVX2 GEFFECT_FAST_INLINE void transpose_8x8(const float* src, int64_t lds, float* dst,
                                                         int64_t ldd) {
  __m256 r[8], s[8];
  for (int i = 0; i < 4; ++i) {  // rows i and i + 4 side by side, left and right halves
    const float* low = src + i * lds;
    const float* high = src + (i + 4) * lds;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
    r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)),
                                    _mm_loadu_ps(high + 4), 1);
  }
  for (int half = 0; half < 8; half += 4) {
    s[half] = _mm256_unpacklo_ps(r[half], r[half + 1]);
    s[half + 1] = _mm256_unpackhi_ps(r[half], r[half + 1]);
    s[half + 2] = _mm256_unpacklo_ps(r[half + 2], r[half + 3]);
    s[half + 3] = _mm256_unpackhi_ps(r[half + 2], r[half + 3]);
    _mm256_storeu_ps(dst + half * ldd, _mm256_shuffle_ps(s[half], s[half + 2], 0x44));
    _mm256_storeu_ps(dst + (half + 1) * ldd, _mm256_shuffle_ps(s[half], s[half + 2], 0xEE));
    _mm256_storeu_ps(dst + (half + 2) * ldd, _mm256_shuffle_ps(s[half + 1], s[half + 3], 0x44));
    _mm256_storeu_ps(dst + (half + 3) * ldd, _mm256_shuffle_ps(s[half + 1], s[half + 3], 0xEE));
  }
}

// Packs `count` vectors of `depth` elements into panels of `width` of them, the last one filled up
// with zeros: element k of vector j of a panel at [k * width + j].

// Vector j begins at src + j * ld.
GEFFECT_FAST_AVX2 void pack_across(const float* src, int64_t ld, int64_t count, int64_t depth,
                                   int64_t width, float* panels) {
  const int64_t deep = depth / 8 * 8;
  for (int64_t first = 0; first < count; first += width) {
    const int64_t used = std::min(width, count - first), whole = used / 8 * 8;
    float* panel = panels + first * depth;
    const float* from = src + first * ld;
    for (int64_t k = 0; k < deep; k += 8) {
      for (int64_t j = 0; j < whole; j += 8) {
        transpose_8x8(from + j * ld + k, ld, panel + k * width + j, width);
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      float* at = panel + k * width;
      for (int64_t j = k < deep ? whole : 0; j < used; ++j) at[j] = from[j * ld + k];
      std::fill(at + used, at + width, 0.0f);
    }
  }
}

// Element k of all vectors begins at src + k * ld. A few k at a time, so that whole cache lines are
// written: the same place in all panels is likely one set of the cache.
void pack_along(const float* src, int64_t ld, int64_t count, int64_t depth, int64_t width,
                float* panels) {
  for (int64_t from = 0; from < depth; from += kQuad) {
    const int64_t to = std::min(from + kQuad, depth);
    for (int64_t first = 0; first < count; first += width) {
      float* panel = panels + first * depth;
      const int64_t used = std::min(width, count - first);
      for (int64_t k = from; k < to; ++k) {
        const float* row = src + k * ld + first;
        float* at = panel + k * width;
        if (used < width) {
          std::fill(std::copy_n(row, used, at), at + width, 0.0f);
          continue;
        }
        for (int64_t j = 0; j < width; j += kQuad) {
          std::memcpy(at + j, row + j, kQuad * sizeof(float));
        }
      }
    }
  }
}

// A block of the result: kKernel->rows x kKernel->width elements from (row, col), of which height x
// width lie in the result, and the factors of their product.
struct RegisterBlock {
  bool whole() const { return height == kKernel->rows && width == kKernel->width; }

  // out (kKernel->rows x kKernel->width, rows ldo apart) = or += the product.
  void product(float* out, int64_t ldo, bool accumulate) const {
    (packed ? kKernel->packed_product : kKernel->product)(x, ldx, y, depth, out, ldo, accumulate);
  }

  int64_t row, col, height, width;
  const float *x, *y;
  int64_t ldx, depth, from;
  bool packed;
};

// Calls body(block) for every block of the product of x and y, a piece of the depth at a time; by
// rows of blocks.
template <class Body>
void for_blocks(const Block<float>& x, Transpose tx, const Block<float>& y, Transpose ty,
                const Body& body) {
  thread_local const Scratch<float> y_panels(kDepth * (kColumns + kWidest));
  thread_local const Scratch<float> x_panels(kDepth * kRowsAtOnce);
  const int64_t block_rows = kKernel->rows, block_width = kKernel->width;
  const bool x_along = tx == Transpose::kYes, y_along = ty == Transpose::kNo;
  const int64_t rows = x_along ? x.cols : x.rows, cols = y_along ? y.cols : y.rows;
  const int64_t depth = x_along ? x.rows : x.cols;
  const int64_t step = ceil_div(depth, std::max<int64_t>(ceil_div(depth, kDepth), 1));
  for (int64_t from = 0; from < depth; from += step) {
    const int64_t deep = std::min(step, depth - from);
    for (int64_t left = 0; left < cols; left += kColumns) {
      const int64_t right = std::min(left + kColumns, cols);
      (y_along ? pack_along : pack_across)(
          y.data + (y_along ? from * y.ld + left : left * y.ld + from), y.ld, right - left, deep,
          block_width, y_panels.data());
      for (int64_t row = 0, next; row < rows; row = next) {
        // Rows that need no packing one block at a time, others as many as there is room for.
        const bool packed = x_along || rows - row < block_rows;
        next = std::min(row + (packed ? kRowsAtOnce : block_rows), rows);
        const float* x_rows = x.data + (x_along ? from * x.ld + row : row * x.ld + from);
        if (packed) {
          (x_along ? pack_along : pack_across)(x_rows, x.ld, next - row, deep, block_rows,
                                               x_panels.data());
        }
        for (int64_t top = row; top < next; top += block_rows) {
          for (int64_t col = left; col < right; col += block_width) {
            body(RegisterBlock{top, col, std::min(block_rows, next - top),
                               std::min(block_width, right - col),
                               packed ? x_panels.data() + (top - row) * deep : x_rows,
                               y_panels.data() + (col - left) * deep, x.ld, deep, from, packed});
          }
        }
      }
    }
  }
}

}  // namespace

bool packed_gemm_serves() { return kKernel != nullptr; }

void packed_gemm(float* out, const Block<float>& x, Transpose tx, const Block<float>& y,
                 Transpose ty, bool accumulate, Part part) {
  const int64_t rows = tx == Transpose::kYes ? x.cols : x.rows;
  const int64_t cols = ty == Transpose::kNo ? y.cols : y.rows;
  if (!accumulate && (x.rows == 0 || x.cols == 0)) std::fill(out, out + rows * cols, 0.0f);
  for_blocks(x, tx, y, ty, [&](const RegisterBlock& block) {
    if (part == Part::kUpper && block.col + block.width <= block.row) return;
    const bool add = accumulate || block.from > 0;
    float* at = out + block.row * cols + block.col;
    if (block.whole()) return block.product(at, cols, add);
    alignas(64) std::array<float, kMostRows * kWidest> edge;
    block.product(edge.data(), kKernel->width, false);
    for (int64_t i = 0; i < block.height; ++i) {
      for (int64_t j = 0; j < block.width; ++j) {
        at[i * cols + j] = (add ? at[i * cols + j] : 0.0f) + edge[i * kKernel->width + j];
      }
    }
  });
}

void packed_row_dots(double* out, const Block<float>& x, const Block<float>& y,
                     const Block<float>& z) {
  const int64_t n_lanes = kKernel->lanes;
  alignas(64) std::array<float, kMostRows * kMostLanes> lanes = {};
  for_blocks(x, Transpose::kNo, y, Transpose::kYes, [&](const RegisterBlock& block) {
    const float* z_rows = z.data + block.row * z.ld + block.col;
    if (block.whole()) {
      const Dots dots = block.packed ? kKernel->packed_dots : kKernel->dots;
      dots(block.x, block.ldx, block.y, block.depth, z_rows, z.ld, lanes.data());
    } else {
      alignas(64) std::array<float, kMostRows * kWidest> edge;
      block.product(edge.data(), kKernel->width, false);
      for (int64_t i = 0; i < block.height; ++i) {
        out[block.row + i] += dot(edge.data() + i * kKernel->width, z_rows + i * z.ld, block.width);
      }
    }
    const int64_t right = block.col + block.width;
    if (right % kColumns != 0 && right < y.rows) return;  // lanes go on with the next block
    for (int64_t i = 0; i < block.height; ++i) {
      const float* row = lanes.data() + i * n_lanes;
      out[block.row + i] += std::accumulate(row, row + n_lanes, 0.0);
    }
    lanes.fill(0.0f);
  });
}

#else

bool packed_gemm_serves() { return false; }

void packed_gemm(float*, const Block<float>&, Transpose, const Block<float>&, Transpose, bool,
                 Part) {}

void packed_row_dots(double*, const Block<float>&, const Block<float>&, const Block<float>&) {}

#endif

}  // namespace geffect_fast

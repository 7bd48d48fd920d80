#include "common/vec.h"

#include <algorithm>
#include <cstring>

#include "common/instructions.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define GEFFECT_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GEFFECT_FAST_AVX512 __attribute__((target("avx512f")))
#endif

#define GEFFECT_FAST_INLINE inline __attribute__((always_inline))

namespace geffect_fast {
namespace {

template <class T, int kBytes>
using Vec __attribute__((vector_size(kBytes))) = T;
template <class T, int kBytes>
using UnalignedVec __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias)) = T;

template <class T, int kBytes>
GEFFECT_FAST_INLINE T lane_sum(const Vec<T, kBytes>& x) {
  if constexpr (kBytes == sizeof(T)) {
    return x[0];
  } else {
    Vec<T, kBytes / 2> halves[2];
    std::memcpy(halves, &x, sizeof(x));
    return lane_sum<T, kBytes / 2>(halves[0] + halves[1]);
  }
}

// Dot products by vectors of kBytes, tiles of kMostX x 4 pairs of rows in registers: rows come from
// the second-level cache, which is slower than the multiplications of a smaller tile.
template <int kBytes, int kMostX>
struct DotRows {
  // Enough rows to hide the latency of an FMA on two ports.
  static constexpr int kAccumulators = 8;

  template <class T>
  static constexpr int kLanes = kBytes / sizeof(T);

  template <class T, int NX, int NY>
  using Sums = Vec<T, kBytes>[NX][NY];

  // sum += products of one vector of each row.
  template <class T, int NX, int NY>
  static GEFFECT_FAST_INLINE void multiply(const T* const* x, const T* const* y, int64_t at,
                                           Sums<T, NX, NY>& sum) {
    using Unaligned = UnalignedVec<T, kBytes>;
    Vec<T, kBytes> ys[NY];
#pragma GCC unroll 4
    for (int j = 0; j < NY; ++j) ys[j] = *reinterpret_cast<const Unaligned*>(y[j] + at);
#pragma GCC unroll 4
    for (int i = 0; i < NX; ++i) {
      const Vec<T, kBytes> xs = *reinterpret_cast<const Unaligned*>(x[i] + at);
#pragma GCC unroll 4
      for (int j = 0; j < NY; ++j) sum[i][j] += xs * ys[j];
    }
  }

  // out[i * ldo + j] += <x[i], y[j]> over [begin, end).
  template <class T, int NX, int NY>
  static GEFFECT_FAST_INLINE void tile(const T* const* x, const T* const* y, int64_t begin,
                                       int64_t end, double* out, int64_t ldo) {
    constexpr int kUnroll = std::max(kAccumulators / (NX * NY), 1);
    Sums<T, NX, NY> sums[kUnroll] = {};
    int64_t at = begin;
    for (; at + kLanes<T> * kUnroll <= end; at += kLanes<T> * kUnroll) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        multiply<T, NX, NY>(x, y, at + u * kLanes<T>, sums[u]);
      }
    }
    for (; at + kLanes<T> <= end; at += kLanes<T>) multiply<T, NX, NY>(x, y, at, sums[0]);
#pragma GCC unroll 4
    for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NY; ++j) {
        Vec<T, kBytes> lanes = sums[0][i][j];
#pragma GCC unroll 8
        for (int u = 1; u < kUnroll; ++u) lanes += sums[u][i][j];
        double total = lane_sum<T, kBytes>(lanes);
        for (int64_t t = at; t < end; ++t) total += static_cast<double>(x[i][t]) * y[j][t];
        out[i * ldo + j] += total;
      }
    }
  }

  template <int NX, class T>
  static GEFFECT_FAST_INLINE void strip(const T* const* x, const T* const* y, int64_t ny,
                                        int64_t begin, int64_t end, double* out) {
    int64_t j = 0;
    for (; j + 4 <= ny; j += 4) tile<T, NX, 4>(x, y + j, begin, end, out + j, ny);
    for (; j + 2 <= ny; j += 2) tile<T, NX, 2>(x, y + j, begin, end, out + j, ny);
    for (; j < ny; ++j) tile<T, NX, 1>(x, y + j, begin, end, out + j, ny);
  }

  template <class T>
  static GEFFECT_FAST_INLINE void run(const T* const* x, int64_t nx, const T* const* y, int64_t ny,
                                      int64_t n, double* out) {
    for (int64_t begin = 0; begin < n; begin += kDotChunk) {
      const int64_t end = std::min(n, begin + kDotChunk);
      int64_t i = 0;
      if constexpr (kMostX == 4) {
        for (; i + 4 <= nx; i += 4) strip<4>(x + i, y, ny, begin, end, out + i * ny);
      }
      for (; i + 2 <= nx; i += 2) strip<2>(x + i, y, ny, begin, end, out + i * ny);
      for (; i < nx; ++i) strip<1>(x + i, y, ny, begin, end, out + i * ny);
    }
  }
};

using Narrow = DotRows<32, 2>;
using Wide = DotRows<64, 4>;

template <class T>
GEFFECT_FAST_INLINE void add_products_body(const T* x, const T* y, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] += x[i] * y[i];
}

GEFFECT_FAST_INLINE void widen_body(const BFloat16* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(src[i].x) << 16;
    std::memcpy(dst + i, &bits, sizeof(bits));
  }
}

template <class T>
void dot_base(const T* const* x, int64_t nx, const T* const* y, int64_t ny, int64_t n,
              double* out) {
  Narrow::run(x, nx, y, ny, n, out);
}
template <class T>
void add_products_base(const T* x, const T* y, int64_t n, T* out) {
  add_products_body(x, y, n, out);
}
void widen_bf16_base(const BFloat16* src, int64_t n, float* dst) { widen_body(src, n, dst); }
void widen_f16_base(const Half* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

#if defined(__x86_64__)
template <class T>
GEFFECT_FAST_AVX2 void dot_avx2(const T* const* x, int64_t nx, const T* const* y, int64_t ny,
                                int64_t n, double* out) {
  Narrow::run(x, nx, y, ny, n, out);
}
template <class T>
GEFFECT_FAST_AVX512 void dot_avx512(const T* const* x, int64_t nx, const T* const* y, int64_t ny,
                                    int64_t n, double* out) {
  Wide::run(x, nx, y, ny, n, out);
}
template <class T>
GEFFECT_FAST_AVX2 void add_products_avx2(const T* x, const T* y, int64_t n, T* out) {
  add_products_body(x, y, n, out);
}
GEFFECT_FAST_AVX2 void widen_bf16_avx2(const BFloat16* src, int64_t n, float* dst) {
  widen_body(src, n, dst);
}
GEFFECT_FAST_AVX2 void widen_f16_avx2(const Half* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(half));
  }
  widen_f16_base(src + i, n - i, dst + i);
}
#endif

struct VecKernels {
  decltype(&dot_base<float>) dot_f32 = dot_base<float>;
  decltype(&dot_base<double>) dot_f64 = dot_base<double>;
  decltype(&add_products_base<float>) add_products_f32 = add_products_base<float>;
  decltype(&add_products_base<double>) add_products_f64 = add_products_base<double>;
  decltype(&widen_bf16_base) widen_bf16 = widen_bf16_base;
  decltype(&widen_f16_base) widen_f16 = widen_f16_base;

  VecKernels() {
#if defined(__x86_64__)
    if (instructions() != Instructions::kBaseline) {
      dot_f32 = dot_avx2<float>;
      dot_f64 = dot_avx2<double>;
      add_products_f32 = add_products_avx2<float>;
      add_products_f64 = add_products_avx2<double>;
      widen_bf16 = widen_bf16_avx2;
      widen_f16 = widen_f16_avx2;
    }
    if (instructions() == Instructions::kAvx512) {
      dot_f32 = dot_avx512<float>;
      dot_f64 = dot_avx512<double>;
    }
#endif
  }
};

const VecKernels kVec;

}  // namespace

void dot_rows(const float* const* x, int64_t nx, const float* const* y, int64_t ny, int64_t n,
              double* out) {
  kVec.dot_f32(x, nx, y, ny, n, out);
}
void dot_rows(const double* const* x, int64_t nx, const double* const* y, int64_t ny, int64_t n,
              double* out) {
  kVec.dot_f64(x, nx, y, ny, n, out);
}
void add_products(const float* x, const float* y, int64_t n, float* out) {
  kVec.add_products_f32(x, y, n, out);
}
void add_products(const double* x, const double* y, int64_t n, double* out) {
  kVec.add_products_f64(x, y, n, out);
}
void widen(const BFloat16* src, int64_t n, float* dst) { kVec.widen_bf16(src, n, dst); }
void widen(const Half* src, int64_t n, float* dst) { kVec.widen_f16(src, n, dst); }

}  // namespace geffect_fast

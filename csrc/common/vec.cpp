#include "common/vec.h"

#include <algorithm>
#include <cstring>

#include "common/instructions.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define GEFFECT_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

#define GEFFECT_FAST_INLINE inline __attribute__((always_inline))

namespace geffect_fast {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 8;  // hides the latency of an FMA on two ports

template <class T>
using Vec __attribute__((vector_size(kVectorBytes))) = T;
template <class T>
using UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias)) = T;

// out[i * ldo + j] += <x[i], y[j]>, NX x NY pairs held in registers.
template <class T, int NX, int NY>
GEFFECT_FAST_INLINE void dot_tile(const T* const* x, const T* const* y, int64_t begin, int64_t end,
                                  double* out, int64_t ldo) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  constexpr int kUnroll = kAccumulators / (NX * NY);
  Vec<T> sum[NX][NY][kUnroll] = {};
  int64_t at = begin;
  for (; at + kLanes * kUnroll <= end; at += kLanes * kUnroll) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      Vec<T> ys[NY];
#pragma GCC unroll 4
      for (int j = 0; j < NY; ++j) {
        ys[j] = *reinterpret_cast<const UnalignedVec<T>*>(y[j] + at + u * kLanes);
      }
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) {
        const Vec<T> xs = *reinterpret_cast<const UnalignedVec<T>*>(x[i] + at + u * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < NY; ++j) sum[i][j][u] += xs * ys[j];
      }
    }
  }
  for (int i = 0; i < NX; ++i) {
    for (int j = 0; j < NY; ++j) {
      double total = 0;
      Vec<T> lanes = sum[i][j][0];
      for (int u = 1; u < kUnroll; ++u) lanes += sum[i][j][u];
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      total += lanes[0];
      for (int64_t t = at; t < end; ++t) total += static_cast<double>(x[i][t]) * y[j][t];
      out[i * ldo + j] += total;
    }
  }
}

template <class T, int NX>
GEFFECT_FAST_INLINE void dot_strip(const T* const* x, const T* const* y, int64_t ny, int64_t begin,
                                   int64_t end, double* out) {
  int64_t j = 0;
  for (; j + 4 <= ny; j += 4) dot_tile<T, NX, 4>(x, y + j, begin, end, out + j, ny);
  for (; j + 2 <= ny; j += 2) dot_tile<T, NX, 2>(x, y + j, begin, end, out + j, ny);
  for (; j < ny; ++j) dot_tile<T, NX, 1>(x, y + j, begin, end, out + j, ny);
}

template <class T>
GEFFECT_FAST_INLINE void dot_rows_body(const T* const* x, int64_t nx, const T* const* y, int64_t ny,
                                       int64_t n, double* out) {
  for (int64_t begin = 0; begin < n; begin += kDotChunk) {
    const int64_t end = std::min(n, begin + kDotChunk);
    int64_t i = 0;
    for (; i + 2 <= nx; i += 2) dot_strip<T, 2>(x + i, y, ny, begin, end, out + i * ny);
    for (; i < nx; ++i) dot_strip<T, 1>(x + i, y, ny, begin, end, out + i * ny);
  }
}

GEFFECT_FAST_INLINE void widen_body(const BFloat16* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(src[i].x) << 16;
    std::memcpy(dst + i, &bits, sizeof(bits));
  }
}

void dot_f32_base(const float* const* x, int64_t nx, const float* const* y, int64_t ny, int64_t n,
                  double* out) {
  dot_rows_body(x, nx, y, ny, n, out);
}
void dot_f64_base(const double* const* x, int64_t nx, const double* const* y, int64_t ny, int64_t n,
                  double* out) {
  dot_rows_body(x, nx, y, ny, n, out);
}
void widen_bf16_base(const BFloat16* src, int64_t n, float* dst) { widen_body(src, n, dst); }
void widen_f16_base(const Half* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

#if defined(__x86_64__)
GEFFECT_FAST_AVX2 void dot_f32_avx2(const float* const* x, int64_t nx, const float* const* y,
                                    int64_t ny, int64_t n, double* out) {
  dot_rows_body(x, nx, y, ny, n, out);
}
GEFFECT_FAST_AVX2 void dot_f64_avx2(const double* const* x, int64_t nx, const double* const* y,
                                    int64_t ny, int64_t n, double* out) {
  dot_rows_body(x, nx, y, ny, n, out);
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
  decltype(&dot_f32_base) dot_f32 = dot_f32_base;
  decltype(&dot_f64_base) dot_f64 = dot_f64_base;
  decltype(&widen_bf16_base) widen_bf16 = widen_bf16_base;
  decltype(&widen_f16_base) widen_f16 = widen_f16_base;

  VecKernels() {
#if defined(__x86_64__)
    if (instructions() != Instructions::kBaseline) {
      dot_f32 = dot_f32_avx2;
      dot_f64 = dot_f64_avx2;
      widen_bf16 = widen_bf16_avx2;
      widen_f16 = widen_f16_avx2;
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
void widen(const BFloat16* src, int64_t n, float* dst) { kVec.widen_bf16(src, n, dst); }
void widen(const Half* src, int64_t n, float* dst) { kVec.widen_f16(src, n, dst); }

}  // namespace geffect_fast

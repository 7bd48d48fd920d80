// The vector loops that all kernels share: tiles of dot products and conversion to fp32.
//
// Compiled in vec.cpp for the baseline instruction set, for AVX2+FMA and for AVX-512, and chosen
// when the library loads, see instructions.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace geffect_fast {

// out[i * ny + j] += <x[i], y[j]> for all nx * ny pairs of rows of n elements.
// Vector lanes sum at most kDotChunk elements in T, chunks are summed in double.
void dot_rows(const float* const* x, int64_t nx, const float* const* y, int64_t ny, int64_t n,
              double* out);
void dot_rows(const double* const* x, int64_t nx, const double* const* y, int64_t ny, int64_t n,
              double* out);

inline constexpr int64_t kDotChunk = 4096;

// out[i] += x[i] * y[i]
void add_products(const float* x, const float* y, int64_t n, float* out);
void add_products(const double* x, const double* y, int64_t n, double* out);

// dst[i] = src[i] in fp32, exactly.
void widen(const BFloat16* src, int64_t n, float* dst);
void widen(const Half* src, int64_t n, float* dst);

template <class T>
double dot(const T* x, const T* y, int64_t n) {
  double out = 0;
  dot_rows(&x, 1, &y, 1, n, &out);
  return out;
}

}  // namespace geffect_fast

// Emulation of csrc/cuda/intrinsics.cuh, which this file replaces by the order of include folders.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace geffect_fast {

__device__ inline unsigned char* dynamic_shared() { return cuda_shim::dynamic_shared(); }

__device__ inline void wait_for_previous_kernel() { cuda_shim::wait_for_previous_kernel(); }

__device__ inline void copy_async_16(void* dst, const void* src, int bytes) {
  cuda_shim::copy_async(dst, src, bytes);
}
__device__ inline void copy_async_commit() { cuda_shim::copy_async_commit(); }
template <int N>
__device__ inline void copy_async_wait() {
  cuda_shim::copy_async_wait(N);
}

template <bool kTranspose>
__device__ inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  struct Operand {
    const uint16_t* row;
    uint32_t fragment[4];
  } operand{static_cast<const uint16_t*>(row), {}};
  cuda_shim::check_capability("ldmatrix", 75);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    cuda_shim::fail("ldmatrix from an address that is not a multiple of 16");
  }
  if (!cuda_shim::is_shared(row, 16)) cuda_shim::fail("ldmatrix from outside of shared memory");
  const char* name = kTranspose ? "ldmatrix.trans" : "ldmatrix";
  cuda_shim::warp_collective(
      name, cuda_shim::kAllLanes, &operand, [](const cuda_shim::Lanes& lanes) {
        for (int lane = 0; lane < cuda_shim::kLanes; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int i, int j) -> uint32_t {
              return lanes.of<Operand>(8 * matrix + (kTranspose ? j : i)).row[kTranspose ? i : j];
            };
            const int i = lane / 4, j = lane % 4 * 2;
            lanes.of<Operand>(lane).fragment[matrix] = element(i, j) | element(i, j + 1) << 16;
          }
        }
      });
  std::memcpy(fragment, operand.fragment, sizeof fragment);
}

// A 16-bit element as fp32.
template <class T>
inline float element_value(uint32_t bits) {
  T element;
  element.x = static_cast<uint16_t>(bits);
  return static_cast<float>(element);
}

template <class T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } operand{d, a, b};
  const char* name = std::is_same_v<T, BFloat16> ? "mma bf16" : "mma f16";
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  cuda_shim::check_capability(name, 80);
  cuda_shim::warp_collective(
      name, cuda_shim::kAllLanes, &operand, [](const cuda_shim::Lanes& lanes) {
        float left[16][16], right[16][8], sum[16][8];
        for (int lane = 0; lane < cuda_shim::kLanes; ++lane) {
          const auto& own = lanes.of<Operand>(lane);
          const int q = lane / 4, r = lane % 4 * 2;
          for (int half = 0; half < 2; ++half) {  // the lower and the upper 16 bits of a register
            const auto value = [&](uint32_t pair) { return element_value<T>(pair >> 16 * half); };
            left[q][r + half] = value(own.a[0]);
            left[q + 8][r + half] = value(own.a[1]);
            left[q][r + 8 + half] = value(own.a[2]);
            left[q + 8][r + 8 + half] = value(own.a[3]);
            right[r + half][q] = value(own.b[0]);
            right[r + 8 + half][q] = value(own.b[1]);
            sum[q][r + half] = own.d[half];
            sum[q + 8][r + half] = own.d[2 + half];
          }
        }
        cuda_shim::multiply_16x8x16(sum, left, right);
        for (int lane = 0; lane < cuda_shim::kLanes; ++lane) {
          float* own = lanes.of<Operand>(lane).d;
          const int q = lane / 4, r = lane % 4 * 2;
          for (int half = 0; half < 2; ++half) {
            own[half] = sum[q][r + half];
            own[2 + half] = sum[q + 8][r + half];
          }
        }
      });
}

}  // namespace geffect_fast

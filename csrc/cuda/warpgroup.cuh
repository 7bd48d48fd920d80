// Hopper's matrix instruction: a warpgroup (four warps) multiplies tiles that lie in shared memory,
// asynchronously. Machine code exists for sm_90a alone; elsewhere these functions must not be
// reached. The tests replace this file by an emulation.
#pragma once

#include "cuda/intrinsics.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GEFFECT_FAST_WGMMA 1
#else
#define GEFFECT_FAST_WGMMA 0
#endif

namespace geffect_fast {

// Describes a tile in shared memory: panels of 128-byte rows, permuted as panel_offset says, that
// begin on 1024 bytes. Rows are tokens and 128 bytes contracted features; with kTransposed rows are
// contracted tokens and 128 bytes features, further features `panel_bytes` on. (PTX ISA, "matrix
// descriptor": address, leading and stride offsets in units of 16 bytes, 128-byte swizzle.)
template <bool kTransposed>
__device__ __forceinline__ uint64_t describe_tile(const void* tile, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = 1024 / 16;
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return kSwizzle128 | kEightRows << 32 | leading << 16 | ((shared_address(tile) & 0x3ffff) >> 4);
}

// Tiles elsewhere than on multiples of 1024 bytes would be read in another order: better no result.
__device__ __forceinline__ void check_tile_memory(const void* memory) {
#if GEFFECT_FAST_WGMMA
  if (shared_address(memory) % 1024 != 0) __trap();
#endif
}

// Makes what this thread's cp.async brought to shared memory visible to warpgroup_multiply_add;
// before the barrier that tells the others.
__device__ __forceinline__ void publish_to_warpgroups() {
#if GEFFECT_FAST_WGMMA
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Before the first of a group of products: orders accesses to their registers.
__device__ __forceinline__ void warpgroup_begin() {
#if GEFFECT_FAST_WGMMA
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Ends a group; wait<N> returns when all but the last N groups are finished.
__device__ __forceinline__ void warpgroup_commit() {
#if GEFFECT_FAST_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void warpgroup_wait() {
#if GEFFECT_FAST_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
#endif
}

// Eight rows of d as operands of an instruction.
#define GEFFECT_FAST_ROW(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define GEFFECT_FAST_ROWS(i)                                                                      \
  GEFFECT_FAST_ROW(i), GEFFECT_FAST_ROW(i + 1), GEFFECT_FAST_ROW(i + 2), GEFFECT_FAST_ROW(i + 3), \
      GEFFECT_FAST_ROW(i + 4), GEFFECT_FAST_ROW(i + 5), GEFFECT_FAST_ROW(i + 6),                  \
      GEFFECT_FAST_ROW(i + 7)

// d (64 x 64 or 128, fp32) += x (64 x 16) y (16 x the same), described by describe_tile. Warp
// w of the four holds rows 16 w to 16 w + 15; d[j] are columns 8 j to 8 j + 7 in the arrangement of
// multiply_add.
template <class T, bool kTransposed>
__device__ __forceinline__ void warpgroup_multiply_add(float (&d)[8][4], uint64_t x, uint64_t y) {
#if GEFFECT_FAST_WGMMA
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, %34, %34;\n"
        : GEFFECT_FAST_ROWS(0)
        : "l"(x), "l"(y), "n"(kTransposed ? 1 : 0));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, %34, %34;\n"
        : GEFFECT_FAST_ROWS(0)
        : "l"(x), "l"(y), "n"(kTransposed ? 1 : 0));
  }
#else
  __trap();
#endif
}

template <class T, bool kTransposed>
__device__ __forceinline__ void warpgroup_multiply_add(float (&d)[16][4], uint64_t x, uint64_t y) {
#if GEFFECT_FAST_WGMMA
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %66;\n"
        : GEFFECT_FAST_ROWS(0), GEFFECT_FAST_ROWS(8)
        : "l"(x), "l"(y), "n"(kTransposed ? 1 : 0));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %66;\n"
        : GEFFECT_FAST_ROWS(0), GEFFECT_FAST_ROWS(8)
        : "l"(x), "l"(y), "n"(kTransposed ? 1 : 0));
  }
#else
  __trap();
#endif
}

#undef GEFFECT_FAST_ROWS
#undef GEFFECT_FAST_ROW

}  // namespace geffect_fast

// Products of tiles of two matrices by a block: the core of the ghost ops and of segment_bilinear.
//
//   features  acc[i, j] = sum_k x[x0 + i, k] y[y0 + j, k]   rows are tokens, k runs over features
//   tokens    acc[i, j] = sum_k x[k, x0 + i] y[k, y0 + j]   k runs over tokens: tiles of gradients
//
// 16-bit elements are multiplied by tensor cores (m16n8k16), fp32 elements by fp32 FMAs in the same
// arrangement of results over lanes. Shared memory holds `stages` slabs; a slab consists of panels
// of 128-byte rows whose 16-byte chunks are permuted by the row number, so that neither the copies
// nor the reads of a warp meet in a bank. Copies run `stages - 1` slabs ahead.
#pragma once

#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/vector.cuh"
#include "cuda/warpgroup.cuh"

namespace geffect_fast {

// Rows x columns of 16-byte aligned rows with unit column stride.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, cols, row_stride;
};

// A 2-D tensor as an operand: itself where its rows can be copied 16 bytes at a time, else (unit
// column stride missing, or rows that do not begin on 16 bytes) a padded copy that it keeps alive.
template <class T>
class OperandHolder {
 public:
  explicit OperandHolder(const Tensor& tensor) : tensor_(tensor) {
    const int64_t rows = tensor.size(0), cols = tensor.size(1);
    const bool as_it_is =
        tensor.stride(1) == 1 &&
        rows_are_aligned(static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0));
    if (!as_it_is) {
      const int64_t padded = ceil_div(cols, kVector<T>) * kVector<T>;
      const Tensor memory = torch::stable::new_empty(tensor, {rows, padded});
      tensor_ = torch::stable::narrow(const_cast<Tensor&>(memory), 1, 0, cols);
      torch::stable::copy_(tensor_, tensor);
    }
  }
  Operand<T> operand() const {
    return {static_cast<const T*>(tensor_.const_data_ptr()), tensor_.size(0), tensor_.size(1),
            tensor_.stride(0)};
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};

enum class Contract { kFeatures, kTokens };

// kWarpgroups_: multiply with Hopper's instruction, and leave the products of so many slabs in
// flight while the next slab is waited for.
template <class T_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_,
          bool kWarpgroups_ = false, int kInFlight_ = 0>
struct TileTraits {
  using T = T_;
  static constexpr int kM = kM_, kN = kN_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr bool kWarpgroups = kWarpgroups_;
  static constexpr int kInFlight = kInFlight_;
  static constexpr int kAhead = kStages - 1 - kInFlight;  // slabs that copies run ahead
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kK = 128 / sizeof(T);  // contracted elements of a slab: 128 bytes
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kRowTiles = kWarpM / 16, kColTiles = kWarpN / 8;
  static constexpr int kSlabX = kM * 128, kSlabY = kN * 128;
  static constexpr int kSharedBytes = kStages * (kSlabX + kSlabY);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kAhead > 0);
  static_assert(!kWarpgroups || (kWarpM == 16 && kWarpsM % 4 == 0 && kN == 128 && kWarpsN == 1));
};

// A lane's part of the block's tile: entry [i][j] is its part of a 16 x 8 result, see multiply_add.
template <class Traits>
struct Accumulator {
  float part[Traits::kRowTiles][Traits::kColTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[i][j][e] = 0.f;
      }
    }
  }
  // The place of part[i][j][e] in the block's tile.
  static __device__ __forceinline__ int row(int i, int e) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return warp / Traits::kWarpsN * Traits::kWarpM + 16 * i + lane / 4 + 8 * (e / 2);
  }
  static __device__ __forceinline__ int col(int j, int e) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return warp % Traits::kWarpsN * Traits::kWarpN + 8 * j + 2 * (lane % 4) + e % 2;
  }
};

// A product of two tiles: its operands, the tiles' first and end rows (columns, when tokens are
// contracted), and the range of the contraction.
template <class T>
struct TileProduct {
  Operand<T> x, y;
  int64_t x0, x_end, y0, y_end, k0, k_end;
  bool same;  // x and y are one tile: it is copied once
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a panel of 128-byte rows.
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Copies rows [row, row + kRows) x 128 bytes of columns from `col` into a panel; zeros from row_end
// and col_end on.
template <class T, int kRows, int kThreads>
__device__ __forceinline__ void copy_panel(unsigned char* panel, const Operand<T>& from,
                                           int64_t row, int64_t row_end, int64_t col,
                                           int64_t col_end) {
  constexpr int kPer = kVector<T>, kStep = kThreads / 8;  // eight threads copy a row
  static_assert(kRows % kStep == 0 && kStep % 8 == 0);
  const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int64_t left = col_end - col - chunk * kPer;
  const int bytes = (left < 0      ? 0
                     : left < kPer ? static_cast<int>(left)
                                   : kPer) *
                    static_cast<int>(sizeof(T));
  const T* source = from.data + (row + first) * from.row_stride + col + chunk * kPer;
  unsigned char* to = panel + panel_offset(first, chunk);
#pragma unroll
  for (int r = 0; r < kRows; r += kStep) {
    const bool valid = bytes > 0 && row + first + r < row_end;
    copy_async_16(to + r * 128, valid ? source : from.data, valid ? bytes : 0);
    source += kStep * from.row_stride;
  }
}

// Multiplies a sequence of products through one pipeline of slabs, so that the copies of the next
// product begin while the last one is multiplied.
template <class Traits, Contract kContract>
class TilePipeline {
  using T = typename Traits::T;
  static constexpr int kK = Traits::kK;

 public:
  __device__ __forceinline__ explicit TilePipeline(unsigned char* shared) : shared_(shared) {
    if constexpr (Traits::kWarpgroups) check_tile_memory(shared);
  }

  static __device__ __forceinline__ int slabs(const TileProduct<T>& product) {
    return static_cast<int>(ceil_div(product.k_end - product.k0, kK));
  }

  // acc = product. Ends with a barrier, after which the shared memory is free.
  __device__ __forceinline__ void multiply(const TileProduct<T>& product,
                                           Accumulator<Traits>& acc) {
    const int n = slabs(product);
    start(product, product, n, n);
    run(product, product, n, n, 0, n, product.same, acc);
    finish();
  }

  // acc1 = first, acc2 = second.
  __device__ __forceinline__ void multiply(const TileProduct<T>& first, Accumulator<Traits>& acc1,
                                           const TileProduct<T>& second,
                                           Accumulator<Traits>& acc2) {
    const int n_first = slabs(first), n_all = n_first + slabs(second);
    start(first, second, n_first, n_all);
    run(first, second, n_first, n_all, 0, n_first, first.same, acc1);
    run(first, second, n_first, n_all, n_first, n_all, second.same, acc2);
    finish();
  }

 private:
  __device__ __forceinline__ void start(const TileProduct<T>& first, const TileProduct<T>& second,
                                        int n_first, int n_all) {
#pragma unroll
    for (int slab = 0; slab < Traits::kAhead; ++slab) {
      copy_next(first, second, n_first, n_all, slab);
    }
  }

  // Multiplies slabs [slab, end), all of one product.
  __device__ __forceinline__ void run(const TileProduct<T>& first, const TileProduct<T>& second,
                                      int n_first, int n_all, int slab, int end, bool same,
                                      Accumulator<Traits>& acc) {
    acc.clear();
    for (; slab < end; ++slab) step(first, second, n_first, n_all, slab, same, acc);
    // Nothing may touch accumulators, these or others, while products are in flight.
    if constexpr (Traits::kWarpgroups) warpgroup_wait<0>();
  }

  __device__ __forceinline__ void finish() {
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ unsigned char* stage(int slab) const {
    return shared_ + slab % Traits::kStages * (Traits::kSlabX + Traits::kSlabY);
  }

  __device__ __forceinline__ void copy_next(const TileProduct<T>& first,
                                            const TileProduct<T>& second, int n_first, int n_all,
                                            int slab) {
    if (slab < n_first) {
      copy_slab(first, stage(slab), first.k0 + int64_t{slab} * kK);
    } else if (slab < n_all) {
      copy_slab(second, stage(slab), second.k0 + int64_t{slab - n_first} * kK);
    }
    copy_async_commit();  // also an empty group: the waits count groups
  }

  __device__ __forceinline__ void copy_slab(const TileProduct<T>& product, unsigned char* to,
                                            int64_t k) {
    copy_operand<Traits::kM>(to, product.x, product.x0, product.x_end, k, product.k_end);
    if (product.same) return;
    copy_operand<Traits::kN>(to + Traits::kSlabX, product.y, product.y0, product.y_end, k,
                             product.k_end);
  }

  template <int kTile>
  __device__ __forceinline__ void copy_operand(unsigned char* to, const Operand<T>& from,
                                               int64_t at, int64_t end, int64_t k, int64_t k_end) {
    if constexpr (kContract == Contract::kFeatures) {
      copy_panel<T, kTile, Traits::kThreads>(to, from, at, end, k, k_end);
    } else {
#pragma unroll
      for (int panel = 0; panel < kTile / kK; ++panel) {
        copy_panel<T, kK, Traits::kThreads>(to + panel * kK * 128, from, k, k_end, at + panel * kK,
                                            end);
      }
    }
  }

  __device__ __forceinline__ void step(const TileProduct<T>& first, const TileProduct<T>& second,
                                       int n_first, int n_all, int slab, bool same,
                                       Accumulator<Traits>& acc) {
    copy_async_wait<Traits::kAhead - 1>();
    if constexpr (Traits::kWarpgroups) publish_to_warpgroups();
    // The slab has arrived. No thread reads the slab that is overwritten next: its products were
    // finished when its readers came here.
    __syncthreads();
    copy_next(first, second, n_first, n_all, slab + Traits::kAhead);
    const unsigned char* x = stage(slab);
    const unsigned char* y = same ? x : x + Traits::kSlabX;
    if constexpr (Traits::kWarpgroups) {
      multiply_slab_warpgroups(x, y, acc);
    } else if constexpr (sizeof(T) == 2) {
      multiply_slab_tensor_cores(x, y, acc);
    } else {
      multiply_slab_fp32(x, y, acc);
    }
  }

  static __device__ __forceinline__ void multiply_slab_warpgroups(const unsigned char* x,
                                                                  const unsigned char* y,
                                                                  Accumulator<Traits>& acc) {
    constexpr bool kTransposed = kContract == Contract::kTokens;
    constexpr int kPanel = kK * 128;
    // 64 rows (or features) of x begin every 64 rows, that is, every panel
    const uint64_t left = describe_tile<kTransposed>(x + threadIdx.x / 128 * 64 * 128, kPanel);
    const uint64_t right = describe_tile<kTransposed>(y, kPanel);
    warpgroup_begin();
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      const int step = (kTransposed ? k * 128 : k * static_cast<int>(sizeof(T))) / 16;
      warpgroup_multiply_add<T, kTransposed>(acc.part[0], left + step, right + step);
    }
    warpgroup_commit();
    warpgroup_wait<Traits::kInFlight>();
  }

  // Byte offset of 8 elements: row (token or feature) `at`, contracted elements from `k`; when
  // tokens are contracted the eight are features from `at` of token `k`.
  static __device__ __forceinline__ int offset(int at, int k) {
    if constexpr (kContract == Contract::kFeatures) {
      return panel_offset(at, k / kVector<T>);
    } else {
      return at / kK * kK * 128 + panel_offset(k, at % kK / kVector<T>);
    }
  }

  static __device__ __forceinline__ void multiply_slab_tensor_cores(const unsigned char* x,
                                                                    const unsigned char* y,
                                                                    Accumulator<Traits>& acc) {
    constexpr bool kTranspose = kContract == Contract::kTokens;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int m0 = warp / Traits::kWarpsN * Traits::kWarpM;
    const int n0 = warp % Traits::kWarpsN * Traits::kWarpN;
    // Which row of which of the four 8 x 8 matrices this lane addresses: low bit and high bit of
    // lane / 8 step along the tile or along k, in the order in which multiply_add wants them.
    const int row8 = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t x_part[Traits::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < Traits::kRowTiles; ++i) {
        const int at = m0 + 16 * i;
        const int where =
            kTranspose ? offset(at + low, k + row8 + high) : offset(at + row8 + low, k + high);
        load_matrices<kTranspose>(x_part[i], x + where);
      }
#pragma unroll
      for (int j = 0; j < Traits::kColTiles; j += 2) {
        const int at = n0 + 8 * j;
        const int where =
            kTranspose ? offset(at + high, k + row8 + low) : offset(at + row8 + high, k + low);
        uint32_t y_part[4];
        load_matrices<kTranspose>(y_part, y + where);
        const uint32_t left[2] = {y_part[0], y_part[1]}, right[2] = {y_part[2], y_part[3]};
#pragma unroll
        for (int i = 0; i < Traits::kRowTiles; ++i) {
          multiply_add<T>(acc.part[i][j], x_part[i], left);
          multiply_add<T>(acc.part[i][j + 1], x_part[i], right);
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply_slab_fp32(const unsigned char* x,
                                                            const unsigned char* y,
                                                            Accumulator<Traits>& acc) {
    constexpr int kRows = 2 * Traits::kRowTiles, kCols = 2 * Traits::kColTiles;
    if constexpr (kContract == Contract::kFeatures) {
#pragma unroll 1
      for (int k = 0; k < kK; k += 4) {
        float4 xs[kRows], ys[kCols];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int at = Accumulator<Traits>::row(r / 2, 2 * (r % 2));
          xs[r] = *reinterpret_cast<const float4*>(x + offset(at, k));
        }
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          const int at = Accumulator<Traits>::col(c / 2, c % 2);
          ys[c] = *reinterpret_cast<const float4*>(y + offset(at, k));
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kCols; ++c) {
            float& sum = acc.part[r / 2][c / 2][2 * (r % 2) + c % 2];
            sum = fmaf(xs[r].x, ys[c].x, sum);
            sum = fmaf(xs[r].y, ys[c].y, sum);
            sum = fmaf(xs[r].z, ys[c].z, sum);
            sum = fmaf(xs[r].w, ys[c].w, sum);
          }
        }
      }
    } else {
#pragma unroll 2
      for (int k = 0; k < kK; ++k) {
        float xs[kRows], ys[kCols];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int at = Accumulator<Traits>::row(r / 2, 2 * (r % 2));
          xs[r] = reinterpret_cast<const float*>(x + offset(at, k))[at % 4];
        }
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          const int at = Accumulator<Traits>::col(c / 2, c % 2);
          ys[c] = reinterpret_cast<const float*>(y + offset(at, k))[at % 4];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kCols; ++c) {
            float& sum = acc.part[r / 2][c / 2][2 * (r % 2) + c % 2];
            sum = fmaf(xs[r], ys[c], sum);
          }
        }
      }
    }
  }

  unsigned char* shared_;
};

// The tiles that kernels use. Small ones waste less on short segments; large ones read shared
// memory and the second-level cache less, for 16-bit elements (fp32 FMAs want the registers).
template <class T>
using SmallTile = TileTraits<T, 64, 64, 2, 2, 3>;
template <class T>
using LargeTile = TileTraits<T, 128, 128, 2, 4, 3>;
// Hopper's: one block a multiprocessor with a slab's products in flight, or two without.
template <class T>
using HopperTile = TileTraits<T, 128, 128, 8, 1, 5, true, 1>;
template <class T>
using HopperPairedTile = TileTraits<T, 128, 128, 8, 1, 3, true, 0>;

template <class T>
inline constexpr bool kTensorCores = sizeof(T) == 2;

// The side of the largest tile for elements of T.
template <class T>
inline constexpr int kTileSide = kTensorCores<T> ? 128 : 64;

// Calls body(tile) with the tile for `device`: Hopper's where it has the instruction, else the
// large one; the small one for fp32.
template <class T, template <class> class Hopper, class Body>
void with_tile(const Device& device, const Body& body) {
  if constexpr (kTensorCores<T>) {
    if (device.has_warpgroups()) {
      body(Hopper<T>{});
    } else {
      body(LargeTile<T>{});
    }
  } else {
    body(SmallTile<T>{});
  }
}

}  // namespace geffect_fast

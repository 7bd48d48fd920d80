// segment_bilinear: out[m, i] = sum_{t in segment i} g_t^T V_m a_t; per token on request
//
// a (total_tokens, d_in), g (total_tokens, d_out), v (M, d_out, d_in), cu_seqlens (n + 1)
//   -> (M, n) or (M, total_tokens) fp32; any strides.
//
// Three forms leave terms[slice, m, t], whose slices are added, by segment or by token, in a second
// stage (segment_sum.cuh):
//   fused    a block owns a tile of Z_m = A V_m^T (tokens x d_out) in registers, multiplies it by
//            the same tile of G and adds along d_out: one slice for each tile of d_out. Blocks that
//            follow each other share rows of A, whatever their m.
//   sm90     the same with Hopper's instructions (segment_bilinear_sm90.cu)
//   cublas   Z_m by cuBLAS in fp32, as many tokens at a time as the second-level cache holds, then
//            a warp a token multiplies it by G: one slice.
// Z never exists whole. choose.h says which form serves. Limiter: arithmetic.
#include "cuda/bilinear_gradient.cuh"
#include "cuda/choose.h"
#include "cuda/gemm.h"
#include "cuda/segment_sum.cuh"
#include "cuda/tile_product.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "segment_bilinear";
constexpr int64_t kTokenTiles = 8;  // tiles of tokens whose rows of A are used together

// M directions of one layer.
template <class T>
struct Directions {
  Operand<T> first;
  int64_t n, stride;
};

// Elements `col` and `col + 1` of a row that begins on 16 bytes; 0 from n_cols on.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* row, int64_t col, int64_t n_cols) {
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (col + 1 < n_cols) {
    const Pair pair = *reinterpret_cast<const Pair*>(row + col);
    return make_float2(static_cast<float>(pair.x), static_cast<float>(pair.y));
  }
  return make_float2(col < n_cols ? static_cast<float>(row[col]) : 0.f, 0.f);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    fused_kernel(Operand<typename Traits::T> a, Operand<typename Traits::T> g,
                 Directions<typename Traits::T> v, float* terms) {
  using T = typename Traits::T;
  __shared__ float row_sums[Traits::kWarpsN][Traits::kM];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t t_tiles = ceil_div(a.rows, Traits::kM), o_tiles = ceil_div(g.cols, Traits::kN);
  const int64_t n_tiles = t_tiles * o_tiles * v.n, in_group = kTokenTiles * o_tiles * v.n;
  for (int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const int64_t first = tile / in_group * kTokenTiles;
    const int64_t tall = min(kTokenTiles, t_tiles - first), rest = tile % in_group;
    const int64_t t = (first + rest % tall) * Traits::kM;
    const int64_t m = rest / tall / o_tiles, o_tile = rest / tall % o_tiles;
    const int64_t o = o_tile * Traits::kN;
    Operand<T> direction = v.first;
    direction.data += m * v.stride;
    Accumulator<Traits> acc;
    TilePipeline<Traits, Contract::kFeatures>(dynamic_shared())
        .multiply({a, direction, t, a.rows, o, g.cols, 0, a.cols, false}, acc);
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = Accumulator<Traits>::row(i, e);
        float sum = 0.f;
        if (t + row < g.rows) {
          const T* from = g.data + (t + row) * g.row_stride;
#pragma unroll
          for (int j = 0; j < Traits::kColTiles; ++j) {
            const float2 pair = load_pair(from, o + Accumulator<Traits>::col(j, e), g.cols);
            sum = fmaf(acc.part[i][j][e], pair.x, sum);
            sum = fmaf(acc.part[i][j][e + 1], pair.y, sum);
          }
        }
        // four lanes hold a row
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) row_sums[warp % Traits::kWarpsN][row] = sum;
      }
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row < Traits::kM && t + row < a.rows) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < Traits::kWarpsN; ++w) sum += row_sums[w][row];
      terms[(o_tile * v.n + m) * a.rows + t + row] = sum;
    }
    // The next tile's barriers keep its sums from overwriting these.
  }
}

// terms[t] = z[t] . g[t] for z's rows; a warp owns a token.
template <class T>
__global__ void row_dots_kernel(const float* z, Operand<T> g, float* terms) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; t < g.rows;
       t += warps) {
    const float* z_row = z + t * g.cols;
    const T* g_row = g.data + t * g.row_stride;
    float sum = 0.f;
#pragma unroll 8
    for (int64_t o = lane; o < g.cols; o += kWarp) {
      sum = fmaf(z_row[o], static_cast<float>(g_row[o]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) terms[t] = sum;
  }
}

// The directions as an operand, copied where their rows cannot be read 16 bytes at a time.
template <class T>
class DirectionsHolder {
 public:
  explicit DirectionsHolder(const Tensor& v)
      : n_(v.size(0)),
        rows_(v.size(1)),
        flat_(torch::stable::reshape(v, {n_ * rows_, v.size(2)})) {}
  Directions<T> directions() const {
    Operand<T> first = flat_.operand();
    first.rows = rows_;
    return {first, n_, rows_ * first.row_stride};
  }

 private:
  int64_t n_, rows_;
  OperandHolder<T> flat_;
};

// terms (tiles of d_out, M, total_tokens)
template <class T>
Tensor fused_terms(const Device& device, const Tensor& a, const Tensor& g, const Tensor& v) {
  const OperandHolder<T> a_held(a), g_held(g);
  const DirectionsHolder<T> v_held(v);
  const int64_t o_tiles = ceil_div(g.size(1), kTileSide<T>);
  const int64_t n_tiles = ceil_div(a.size(0), kTileSide<T>) * o_tiles * v.size(0);
  const Tensor terms = new_float(a, {o_tiles, v.size(0), a.size(0)});
  with_tile<T, HopperPairedTile>(device, [&](auto tile) {
    using Traits = decltype(tile);
    device.launch(fused_kernel<Traits>, device.grid_for_tiles(n_tiles), dim3(Traits::kThreads),
                  Traits::kSharedBytes, a_held.operand(), g_held.operand(), v_held.directions(),
                  terms.mutable_data_ptr<float>());
  });
  return terms;
}

// terms (1, M, total_tokens)
template <class T>
Tensor cublas_terms(const Device& device, const Tensor& a, const Tensor& g, const Tensor& v) {
  constexpr int64_t kFewestTokens = 1024;  // a GEMM of fewer rows would not fill the device
  const int64_t total = a.size(0), n_directions = v.size(0), d_out = g.size(1);
  const OperandHolder<T> g_held(g);
  const Tensor terms = new_float(a, {1, n_directions, total});
  const int64_t in_cache = device.l2_bytes() / 2 / (std::max<int64_t>(d_out, 1) * 4);
  const int64_t step = std::max(kFewestTokens, in_cache / 128 * 128);
  for (int64_t t = 0; t < total; t += step) {
    const int64_t tokens = std::min(step, total - t);
    Operand<T> g_rows = g_held.operand();
    g_rows.data += t * g_rows.row_stride;
    g_rows.rows = tokens;
    const Tensor a_rows = torch::stable::narrow(const_cast<Tensor&>(a), 0, t, tokens);
    for (int64_t m = 0; m < n_directions; ++m) {
      const Tensor direction = torch::stable::select(v, 0, m);
      const Tensor z = matmul_fp32(a_rows, torch::stable::transpose(direction, 0, 1));
      device.launch(row_dots_kernel<T>, device.grid_for_tiles(ceil_div(tokens, 4)), dim3(4 * kWarp),
                    0, z.const_data_ptr<float>(), g_rows,
                    terms.mutable_data_ptr<float>() + m * total + t);
    }
  }
  return terms;
}

// terms (tiles of d_out, M, total_tokens), or nothing where this build or these arguments have no
// such kernel: the first size is 0.
inline Tensor hopper_terms(const Tensor& a, const Tensor& g, const Tensor& v) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(g), from(v)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("geffect_fast::segment_bilinear_terms_sm90",
                                                      "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
Tensor terms_of(BilinearForm form, const Device& device, const Tensor& a, const Tensor& g,
                const Tensor& v) {
  if constexpr (kTensorCores<T>) {
    if (form == BilinearForm::kFused) return fused_terms<T>(device, a, g, v);
  }
  if (form == BilinearForm::kHopper) {
    const Tensor terms = hopper_terms(a, g, v);
    if (terms.size(0) > 0) return torch::stable::contiguous(terms);
  }
  return cublas_terms<T>(device, a, g, v);
}

Tensor segment_bilinear(const Tensor& a, const Tensor& g, const Tensor& v, const Tensor& cu_seqlens,
                        bool per_token) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "g", g, 2);
  check_dim(kOp, "v", v, 3);
  const int64_t total_tokens = a.size(0), n_directions = v.size(0);
  check_shape(kOp, "g", g, {total_tokens, g.size(1)});
  check_shape(kOp, "v", v, {n_directions, g.size(1), a.size(1)});
  check_dtype(kOp, "g", g, a.scalar_type());
  check_dtype(kOp, "v", v, a.scalar_type());
  check_one_device(kOp, {&a, &g, &v, &cu_seqlens});
  const Device device(a);
  const Offsets offsets = offsets_of(kOp, "cu_seqlens", cu_seqlens, total_tokens);
  int* report = OffsetReport::device_word(kOp, kSegmentBilinear);
  return dispatch_cuda_dtype(kOp, a.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Tensor out = new_float(a, {n_directions, per_token ? total_tokens : offsets.n});
    if (n_directions == 0) return out;
    const BilinearForm form =
        bilinear_form({device.capability(), device.n_multiprocessors()}, kTensorCores<T>, per_token,
                      {total_tokens, offsets.n, a.size(1), g.size(1), n_directions});
    if (form == BilinearForm::kGradient) {
      if constexpr (kTensorCores<T>) {
        const OperandHolder<T> a_held(a), g_held(g);
        const DirectionsHolder<T> v_held(v);
        const Directions<T> all = v_held.directions();
        bilinear_by_gradients(device, a_held.operand(), g_held.operand(), all.first, all.n,
                              all.stride, offsets, report, out);
      }
      return out;
    }
    const Tensor terms = terms_of<T>(form, device, a, g, v);
    const float* from = terms.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    if (per_token) {
      token_sum(device, from, terms.size(0), n_directions, total_tokens, to);
    } else {
      segment_sum(device, from, terms.size(0), n_directions, offsets, report, to);
    }
    return out;
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(segment_bilinear)

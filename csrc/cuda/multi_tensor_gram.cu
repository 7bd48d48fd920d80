// multi_tensor_gram: out[c, j, k] = sum_{p: groups[p] = c} < grads[j][p], grads[k][p] >
//
// K lists of P same-shaped tensors, flattened list by list -> (n_groups, K, K) fp32, symmetric; any
// strides. Tensors that have one dense layout in all lists are read as memory; others are copied to
// row-major order, one by one, only then. All tensors share a launch, for as many as a table of
// kernel parameters holds: no other memory is written by the host.
//
// A block owns a chunk of one tensor in all lists, at most 16 of them, and reads it once. Up to 8
// lists, and all fp32 lists, are multiplied by FMAs, a lane reading 16 bytes of every list at once
// and keeping its share of all K (K + 1) / 2 sums; 9 to 16 lists of 16-bit elements by tensor cores
// out of shared memory, where a warp copies 512 contiguous bytes of every list and keeps the K x K
// matrix. More than 16 lists go by pairs of 8, each list being read once for every 8 others. The
// sums of a chunk are a column of `partials`, which segment_sum adds up by group. Limiter: bytes of
// the gradients.
#include "common/tensor_lists.h"
#include "cuda/chunk.cuh"
#include "cuda/device.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/segment_sum.cuh"

namespace geffect_fast {
namespace {

constexpr const char* kOp = "multi_tensor_gram";
constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTableBytes = 28 * 1024;  // of the 32764 that the parameters of a kernel may take
constexpr int64_t kMaxChunks = 16384;   // about: bounds the memory of the partial sums

// The tensors of a launch, in order of their groups.
template <int kLists>
struct Table {
  static constexpr int kTensors = kTableBytes / (kLists * 8 + 20);
  const void* data[kTensors][kLists];
  int64_t numel[kTensors], group[kTensors];
  int first_block[kTensors];
  int n_tensors;
  int n_lists;  // those from here on repeat the last one

  // The tensor that `block` works on: the last that begins at it or before.
  __device__ __forceinline__ int tensor_of(int block) const {
    int low = 0, high = n_tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};
static_assert(sizeof(Table<1>) <= 32764 - 64 && sizeof(Table<16>) <= 32764 - 64);

// The number of a pair of lists j <= k, row by row of the upper triangle.
__host__ __device__ constexpr int pair_index(int j, int k, int n_lists) {
  return j * n_lists - j * (j - 1) / 2 + k - j;
}

// The first `left` elements from `at`, wherever it lies, and zeros.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* at, int64_t left) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4] = {};
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    if (e < left) {
      const uint32_t bits = reinterpret_cast<const Bits*>(at)[e];
      words[e / kPerWord] |= bits << (e % kPerWord * 16);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The chunk of a tensor that a block multiplies, in all lists.
template <int kLists>
struct GramChunk {
  const void* const (&lists)[kLists];
  int n_lists;
  int64_t begin, end;
  bool is_aligned;  // every list begins on 16 bytes
};

// A lane's share of the sums of all pairs. The lanes of a block read a unit of every list at once
// and issue the loads of a step together.
template <class T_, int kLists_>
struct FmaSums {
  using T = T_;
  static constexpr int kLists = kLists_, kPairs = kLists * (kLists + 1) / 2;
  static constexpr int kUnit = kThreads * kVector<T>;
  static constexpr int kUnroll = ceil_div(kLoadsAtOnce, kLists), kStep = kUnit * kUnroll;
  // Blocks of a multiprocessor, hence at most 80, 128 or 255 registers; and the least bytes of a
  // chunk in all lists, so that reading it takes longer than looking it up and adding up its sums.
  static constexpr int kBlocks = kLists <= 4 ? 6 : kLists <= 8 ? 4 : 2;
  static constexpr int64_t kChunkBytes = kLists <= 8 ? 128 * 1024 : 512 * 1024;
  static constexpr int kEntries = kPairs, kSharedBytes = 0;

  float sums[kPairs] = {};

  __device__ __forceinline__ void add(const uint4 (&chunks)[kLists]) {
    float x[kLists][kVector<T>];
#pragma unroll
    for (int j = 0; j < kLists; ++j) unpack(chunks[j], x[j], T{});
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
#pragma unroll
      for (int j = 0; j < kLists; ++j) {
#pragma unroll
        for (int k = j; k < kLists; ++k) {
          float& sum = sums[pair_index(j, k, kLists)];
          sum = fmaf(x[j][e], x[k][e], sum);
        }
      }
    }
  }

  __device__ __forceinline__ void add(const GramChunk<kLists>& chunk) {
    const T* lists[kLists];
#pragma unroll
    for (int j = 0; j < kLists; ++j) {
      lists[j] = static_cast<const T*>(chunk.lists[j]) + threadIdx.x * kVector<T>;
    }
    int64_t at = chunk.begin;
    if (chunk.is_aligned) {
#pragma unroll 1
      for (; at + kStep <= chunk.end; at += kStep) {
        uint4 chunks[kUnroll][kLists];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int j = 0; j < kLists; ++j) {
            chunks[u][j] = *reinterpret_cast<const uint4*>(lists[j] + at + u * kUnit);
          }
        }
        __syncwarp();  // keeps the compiler from using a load before it has issued the others
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add(chunks[u]);
      }
    }
#pragma unroll 1
    for (; at < chunk.end; at += kUnit) {
      const int64_t left = chunk.end - at - threadIdx.x * kVector<T>;
      uint4 chunks[kLists];
#pragma unroll
      for (int j = 0; j < kLists; ++j) chunks[j] = load_elements(lists[j] + at, left);
      add(chunks);
    }
  }

  // Writes the sums of the warp to entries[kEntries].
  __device__ __forceinline__ void store_warp(float* entries) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int first = 0; first < kPairs; first += kWarp) {
      float part[kWarp];
#pragma unroll
      for (int i = 0; i < kWarp; ++i) part[i] = first + i < kPairs ? sums[first + i] : 0.f;
      const float total = warp_sum_each(part);
      if (first + lane < kPairs) entries[first + lane] = total;
    }
  }
  static __device__ __forceinline__ int entry(int pair) { return pair; }
};

// A warp's 16 x 16 sums of 16-bit elements. A stage is the data that a warp multiplies at once:
// kRow contiguous bytes of every list. The warp copies it to shared memory while it multiplies the
// stage before, and waits for no other warp. The 16 bytes with number c of list j lie in place c ^
// (j % 8) of its row: both a copy and a matrix of eight lists use all banks.
template <class T_>
struct TensorCoreSums {
  using T = T_;
  static constexpr int kLists = 16, kPairs = kLists * (kLists + 1) / 2;
  static constexpr int kStages = 2, kStageBytes = 8192;
  static constexpr int kRow = kStageBytes / kLists, kPlaces = kRow / 16;
  static constexpr int kWarpStep = kRow / sizeof(T), kStep = kWarps * kWarpStep;
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes;
  static constexpr int kBlocks = 3;  // whose stages a multiprocessor of Hopper holds
  static constexpr int64_t kChunkBytes = 128 * 1024;
  static constexpr int kEntries = kLists * kLists;

  float sums[2][4] = {};

  // Starts copying this warp's elements from `at` on, and zeros from the chunk's end on.
  static __device__ __forceinline__ void load(const GramChunk<kLists>& chunk, int64_t at,
                                              unsigned char* stage) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kLists; ++j) {
      if (j >= chunk.n_lists) break;
      const T* const list = static_cast<const T*>(chunk.lists[j]);
#pragma unroll
      for (int c = 0; c < kPlaces; c += kWarp) {
        const int64_t first = at + (c + lane) * kVector<T>, left = chunk.end - first;
        unsigned char* const place = stage + j * kRow + ((c + lane) ^ j % 8) * 16;
        if (chunk.is_aligned) {
          const int64_t elements = max(int64_t{0}, min(left, int64_t{kVector<T>}));
          copy_async_16(place, list + (left > 0 ? first : chunk.begin),
                        static_cast<int>(elements * sizeof(T)));
        } else {
          *reinterpret_cast<uint4*>(place) = load_elements(list + first, left);
        }
      }
    }
  }

  // A matrix of eight lists is part of the left factor and of the right one; that of lists 8 to 15
  // is the lower half of the left one.
  __device__ __forceinline__ void multiply(const unsigned char* stage) {
    const int matrix = threadIdx.x % kWarp / 8, row = threadIdx.x % 8;
    const unsigned char* const own = stage + (matrix % 2 * 8 + row) * kRow;
#pragma unroll 2
    for (int c = 0; c < kPlaces; c += 4) {
      // Tensor cores truncate their sums: 32 products there, the rest by additions in fp32.
      float tiles[2][4] = {};
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        uint32_t x[4];
        load_matrices<false>(x, own + ((c + half + matrix / 2) ^ row) * 16);
        multiply_add<T>(tiles[0], x, {x[0], x[2]});
        multiply_add<T>(tiles[1], x, {x[1], x[3]});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0][i] += tiles[0][i];
        sums[1][i] += tiles[1][i];
      }
    }
  }

  __device__ __forceinline__ void add(const GramChunk<kLists>& chunk) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    unsigned char* const stages = dynamic_shared() + warp * kStages * kStageBytes;
    // Lists that are not there are never copied.
    for (int s = 0; s < kStages; ++s) {
      for (int at = chunk.n_lists * kRow + lane * 16; at < kStageBytes; at += kWarp * 16) {
        *reinterpret_cast<uint4*>(stages + s * kStageBytes + at) = {};
      }
    }
    int64_t at = chunk.begin + warp * kWarpStep;
    if (at < chunk.end) load(chunk, at, stages);
    copy_async_commit();
#pragma unroll 1
    for (int stage = 0; at < chunk.end; at += kStep, stage ^= 1) {
      copy_async_wait<0>();
      __syncwarp();  // the other lanes' copies are there, and the other stage has been read
      if (at + kStep < chunk.end) load(chunk, at + kStep, stages + (stage ^ 1) * kStageBytes);
      copy_async_commit();
      multiply(stages + stage * kStageBytes);
    }
  }

  __device__ __forceinline__ void store_warp(float* entries) const {
    const int q = threadIdx.x % kWarp / 4, r = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (q + i / 2 * 8) * kLists + r + i % 2;
      entries[at] = sums[0][i];
      entries[at + 8] = sums[1][i];
    }
  }
  static __device__ __forceinline__ int entry(int pair) {
    int row = 0;
    while (pair >= kLists - row) pair -= kLists - row++;
    return row * kLists + row + pair;
  }
};

// Column first_chunk + blockIdx.x of partials (kPairs, n_chunks), and its group.
template <class Sums>
__global__ void __launch_bounds__(kThreads, Sums::kBlocks)
    multi_tensor_gram_kernel(const __grid_constant__ Table<Sums::kLists> table, int64_t chunk_size,
                             int64_t first_chunk, int64_t n_chunks, float* __restrict__ partials,
                             int64_t* __restrict__ chunk_groups) {
  __shared__ float warp_sums[kWarps][Sums::kEntries];
  const int tensor = table.tensor_of(blockIdx.x);
  const int64_t begin = int64_t{blockIdx.x - table.first_block[tensor]} * chunk_size;
  const int64_t end = min(table.numel[tensor], begin + chunk_size);
  bool is_aligned = true;
  for (int j = 0; j < Sums::kLists; ++j) {
    is_aligned = is_aligned && reinterpret_cast<uintptr_t>(table.data[tensor][j]) % 16 == 0;
  }
  Sums sums;
  const GramChunk<Sums::kLists> chunk{table.data[tensor], table.n_lists, begin, end, is_aligned};
  sums.add(chunk);

  sums.store_warp(warp_sums[threadIdx.x / kWarp]);
  __syncthreads();
  const int64_t column = first_chunk + blockIdx.x;
  for (int pair = threadIdx.x; pair < Sums::kPairs; pair += kThreads) {
    float total = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp][Sums::entry(pair)];
    partials[pair * n_chunks + column] = total;
  }
  if (threadIdx.x == 0) chunk_groups[column] = table.group[tensor];
}

// The chunks of each group, found in their groups, which never decrease.
struct GroupChunks {
  const int64_t* groups;
  int64_t n, total;

  __device__ __forceinline__ int64_t begin(int64_t group) const {
    int64_t low = 0, high = total;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (groups[middle] < group) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ __forceinline__ int64_t end(int64_t group) const { return begin(group + 1); }
  __device__ __forceinline__ bool is_valid(int64_t) const { return true; }
};

// The lists of a launch: eight from `first` and those from `second` on, n in all.
struct Lists {
  int64_t first, second;
  int n;

  __host__ __device__ int64_t operator[](int i) const { return i < 8 ? first + i : second + i - 8; }
};

// The symmetric matrices (n_groups, n_all, n_all) of all lists.
struct Grams {
  float* out;
  int64_t n_all;
  Lists lists;
  int width;  // lists of the kernel; those from lists.n on are repetitions

  __device__ __forceinline__ void store(int64_t pair, int64_t group, double sum) const {
    int j = 0;
    while (pair >= width - j) pair -= width - j++;
    const int k = j + static_cast<int>(pair);
    if (k >= lists.n) return;
    float* const gram = out + group * n_all * n_all;
    gram[lists[j] * n_all + lists[k]] = gram[lists[k] * n_all + lists[j]] = static_cast<float>(sum);
  }
};

// A tensor in all lists, as memory.
struct Parameter {
  std::vector<const void*> data;
  int64_t numel, group;
};

template <class Sums>
void launch_multi_tensor_gram(const Device& device, const std::vector<Parameter>& parameters,
                              const Lists& lists, const Tensor& out) {
  int64_t total = 0;
  for (const Parameter& parameter : parameters) total += parameter.numel;
  const int64_t least = Sums::kChunkBytes / (lists.n * sizeof(typename Sums::T));
  const int64_t chunk_size =
      ceil_div(std::max(least, ceil_div(total, kMaxChunks)), Sums::kStep) * Sums::kStep;
  int64_t n_chunks = 0;
  for (const Parameter& parameter : parameters) n_chunks += ceil_div(parameter.numel, chunk_size);
  const Tensor partials = new_float(out, {Sums::kPairs, n_chunks});
  const Tensor groups = torch::stable::new_empty(out, {n_chunks}, ScalarType::Long);
  float* const partials_data = static_cast<float*>(partials.mutable_data_ptr());
  int64_t* const groups_data = static_cast<int64_t*>(groups.mutable_data_ptr());

  using LaunchTable = Table<Sums::kLists>;
  LaunchTable table;
  int64_t first_chunk = 0;
  int n_blocks = 0;
  table.n_tensors = 0;
  table.n_lists = lists.n;
  for (size_t p = 0; p < parameters.size(); ++p) {
    const int i = table.n_tensors++;
    for (int j = 0; j < Sums::kLists; ++j) {
      table.data[i][j] = parameters[p].data[lists[std::min(j, lists.n - 1)]];
    }
    table.numel[i] = parameters[p].numel;
    table.group[i] = parameters[p].group;
    table.first_block[i] = n_blocks;
    n_blocks += static_cast<int>(ceil_div(parameters[p].numel, chunk_size));
    if (table.n_tensors == LaunchTable::kTensors || p + 1 == parameters.size()) {
      device.launch(multi_tensor_gram_kernel<Sums>, grid_for(n_blocks, n_blocks), dim3(kThreads),
                    Sums::kSharedBytes, table, chunk_size, first_chunk, n_chunks, partials_data,
                    groups_data);
      first_chunk += n_blocks;
      n_blocks = table.n_tensors = 0;
    }
  }
  launch_segment_sum(
      device, partials_data, 1, Sums::kPairs, GroupChunks{groups_data, out.size(0), n_chunks},
      nullptr,
      Grams{static_cast<float*>(out.mutable_data_ptr()), out.size(1), lists, Sums::kLists});
}

// Calls body with the sums of the fewest lists that hold n of them.
template <class T, class Body>
void dispatch_lists(int n, const Body& body) {
  switch (n) {
    case 1:
      return body(FmaSums<T, 1>{});
    case 2:
      return body(FmaSums<T, 2>{});
    case 3:
      return body(FmaSums<T, 3>{});
    case 4:
      return body(FmaSums<T, 4>{});
    case 5:
      return body(FmaSums<T, 5>{});
    case 6:
      return body(FmaSums<T, 6>{});
    case 7:
      return body(FmaSums<T, 7>{});
    case 8:
      return body(FmaSums<T, 8>{});
  }
  if constexpr (sizeof(T) == 2) {
    body(TensorCoreSums<T>{});
  } else if (n <= 12) {
    body(FmaSums<T, 12>{});
  } else {
    body(FmaSums<T, 16>{});
  }
}

// The tensors as memory, in order of their groups; `copies` keeps those alive that had to be made.
std::vector<Parameter> read_parameters(const std::vector<Tensor>& grads,
                                       const std::vector<int64_t>& groups,
                                       std::vector<Tensor>& copies) {
  const size_t n_tensors = groups.size();
  std::vector<Parameter> parameters;
  for (size_t p = 0; p < n_tensors; ++p) {
    if (grads[p].numel() == 0) continue;
    std::vector<Layout> layouts;
    for (size_t i = p; i < grads.size(); i += n_tensors) layouts.emplace_back(grads[i]);
    const bool as_memory = share_dense_layout(layouts);
    Parameter parameter{{}, grads[p].numel(), groups[p]};
    for (size_t i = p; i < grads.size(); i += n_tensors) {
      if (!as_memory) copies.push_back(torch::stable::contiguous(grads[i]));
      parameter.data.push_back((as_memory ? grads[i] : copies.back()).const_data_ptr());
    }
    parameters.push_back(std::move(parameter));
  }
  std::stable_sort(parameters.begin(), parameters.end(),
                   [](const Parameter& a, const Parameter& b) { return a.group < b.group; });
  return parameters;
}

Tensor multi_tensor_gram(const std::vector<Tensor>& grads, int64_t n_lists,
                         const std::vector<int64_t>& groups, int64_t n_groups) {
  check_tensor_lists(kOp, grads, n_lists, groups, n_groups);
  const Device device(grads[0]);
  const Tensor out = new_float(grads[0], {n_groups, n_lists, n_lists});
  std::vector<Tensor> copies;
  const std::vector<Parameter> parameters = read_parameters(grads, groups, copies);
  return dispatch_cuda_dtype(kOp, grads[0].scalar_type(), [&](auto type) {
    const auto launch = [&](const Lists& lists) {
      dispatch_lists<decltype(type)>(lists.n, [&](auto sums) {
        launch_multi_tensor_gram<decltype(sums)>(device, parameters, lists, out);
      });
    };
    if (n_lists <= 8) launch({0, 8, static_cast<int>(n_lists)});
    for (int64_t second = 8; second < n_lists; second += 8) {
      for (int64_t first = 0; first < second; first += 8) {
        launch({first, second, static_cast<int>(std::min<int64_t>(n_lists - second, 8)) + 8});
      }
    }
    return out;
  });
}

}  // namespace
}  // namespace geffect_fast

GEFFECT_FAST_REGISTER_CUDA(multi_tensor_gram)

// CUDA C++ and the part of the CUDA runtime that kernels of this project use, for a host compiler.
//
// The order of include folders finds this file before the real header. Code that uses a function
// missing here fails to compile; add the function with CUDA's own semantics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibres.h"

// The words that cuda_shim.py replaces in the preprocessed text: a kernel states its launch bounds.
#define __global__ SHIM_KERNEL
#define __launch_bounds__(...) SHIM_LAUNCH_BOUNDS(__VA_ARGS__)
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// Thread-local variables of one library lie together, so that they can be filled with NaN. The
// library's symbols give the sizes of a kernel's variables.
#define __shared__ SHIM_SHARED static thread_local

// ---- vector types ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SHIM_VECTOR_TYPES(type, name, of2, of4)                    \
  struct __align__(of2) name##2 { type x, y; };                    \
  struct __align__(of4) name##4 { type x, y, z, w; };              \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTOR_TYPES(int, int, 8, 16)
SHIM_VECTOR_TYPES(unsigned, uint, 8, 16)
SHIM_VECTOR_TYPES(float, float, 8, 16)
#undef SHIM_VECTOR_TYPES
struct __align__(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- a thread's place ----

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = cuda_shim::kLanes;

// ---- synchronisation ----

inline void __syncthreads() { cuda_shim::block_barrier("__syncthreads", false); }
inline int __syncthreads_count(int predicate) {
  return cuda_shim::block_barrier("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_shim::block_barrier("__syncthreads_or", predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_shim::block_barrier("__syncthreads_and", predicate == 0) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline void __syncwarp(unsigned mask = cuda_shim::kAllLanes) {
  cuda_shim::warp_collective("__syncwarp", mask, &mask, [](const cuda_shim::Lanes&) {});
}

// ---- votes and shuffles ----

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Vote {
    bool yes;
    unsigned all;
  } vote{predicate != 0, 0};
  cuda_shim::warp_collective("__ballot_sync", mask, &vote, [](const cuda_shim::Lanes& lanes) {
    unsigned all = 0;
    for (int i = 0; i < cuda_shim::kLanes; ++i) {
      if (lanes.operand[i] != nullptr && lanes.of<Vote>(i).yes) all |= 1u << i;
    }
    for (int i = 0; i < cuda_shim::kLanes; ++i) {
      if (lanes.operand[i] != nullptr) lanes.of<Vote>(i).all = all;
    }
  });
  return vote.all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace cuda_shim {

// The value of lane `source`.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  struct Shuffle {
    T value, result;
    int source;
  } shuffle{value, value, source};
  warp_collective(name, mask, &shuffle, [](const Lanes& lanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (lanes.operand[i] == nullptr) continue;
      Shuffle& own = lanes.of<Shuffle>(i);
      if (lanes.operand[own.source] == nullptr) fail("a shuffle reads a lane outside its mask");
      own.result = lanes.of<Shuffle>(own.source).value;
    }
  });
  return shuffle.result;
}

inline int first_lane(int width) {
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) fail("a shuffle's width is wrong");
  return lane() / width * width;
}

}  // namespace cuda_shim

#define SHIM_SHUFFLES(T)                                                                    \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {          \
    const int first = cuda_shim::first_lane(width);                                         \
    return cuda_shim::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));  \
  }                                                                                         \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {   \
    const int own = cuda_shim::lane(), from = own - static_cast<int>(delta);                \
    const bool inside = from >= cuda_shim::first_lane(width);                               \
    return cuda_shim::shuffle("__shfl_up_sync", mask, value, inside ? from : own);          \
  }                                                                                         \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) { \
    const int own = cuda_shim::lane(), from = own + static_cast<int>(delta);                \
    const bool inside = from < cuda_shim::first_lane(width) + width;                        \
    return cuda_shim::shuffle("__shfl_down_sync", mask, value, inside ? from : own);        \
  }                                                                                         \
  inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {        \
    const int own = cuda_shim::lane(), from = own ^ bits;                                   \
    const bool inside = from < cuda_shim::first_lane(width) + width;                        \
    return cuda_shim::shuffle("__shfl_xor_sync", mask, value, inside ? from : own);         \
  }
SHIM_SHUFFLES(int)
SHIM_SHUFFLES(unsigned)
SHIM_SHUFFLES(long)
SHIM_SHUFFLES(unsigned long)
SHIM_SHUFFLES(long long)
SHIM_SHUFFLES(unsigned long long)
SHIM_SHUFFLES(float)
SHIM_SHUFFLES(double)
#undef SHIM_SHUFFLES

// ---- arithmetic ----

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
// Macros, since the C library declares functions of these names.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __fdividef(x, y) (static_cast<float>(x) / static_cast<float>(y))

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

#define SHIM_MIN_MAX(A, B, Common)                                                   \
  constexpr Common min(A a, B b) {                                                   \
    return static_cast<Common>(b) < static_cast<Common>(a) ? static_cast<Common>(b)  \
                                                           : static_cast<Common>(a); \
  }                                                                                  \
  constexpr Common max(A a, B b) {                                                   \
    return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(b)  \
                                                           : static_cast<Common>(a); \
  }
SHIM_MIN_MAX(int, int, int)
SHIM_MIN_MAX(unsigned, unsigned, unsigned)
SHIM_MIN_MAX(int, unsigned, unsigned)
SHIM_MIN_MAX(unsigned, int, unsigned)
SHIM_MIN_MAX(long, long, long)
SHIM_MIN_MAX(unsigned long, unsigned long, unsigned long)
SHIM_MIN_MAX(long, unsigned long, unsigned long)
SHIM_MIN_MAX(unsigned long, long, unsigned long)
SHIM_MIN_MAX(long long, long long, long long)
SHIM_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
SHIM_MIN_MAX(long long, unsigned long long, unsigned long long)
SHIM_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef SHIM_MIN_MAX
// A NaN yields to a number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- memory ----

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

#define SHIM_ATOMICS(T)                                                              \
  inline T atomicAdd(T* at, T value) { return std::exchange(*at, *at + value); }     \
  inline T atomicMax(T* at, T value) { return std::exchange(*at, max(*at, value)); } \
  inline T atomicMin(T* at, T value) { return std::exchange(*at, min(*at, value)); } \
  inline T atomicExch(T* at, T value) { return std::exchange(*at, value); }          \
  inline T atomicCAS(T* at, T compare, T value) {                                    \
    return std::exchange(*at, *at == compare ? value : *at);                         \
  }
SHIM_ATOMICS(int)
SHIM_ATOMICS(unsigned)
SHIM_ATOMICS(unsigned long long)
#undef SHIM_ATOMICS

// ---- the host's side; errors are thrown, so every call that returns has succeeded ----

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
};
inline constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1,
                          cudaHostAllocMapped = 2;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
inline constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  cuda_shim::check_stream(stream);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  cuda_shim::check_stream(stream);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

namespace cuda_shim {

// Bytes of a kernel's parameters, each at its alignment.
template <class... Params>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)),
   ...);
  return bytes;
}

template <class T>
void check_parameter(const T& value) {
  if constexpr (std::is_pointer_v<T>) check_pointer(value);
}

}  // namespace cuda_shim

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const std::tuple<std::decay_t<Params>...> params(std::forward<Args>(args)...);
  std::apply([](const auto&... each) { (cuda_shim::check_parameter(each), ...); }, params);
  bool early = false;
  unsigned blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      blocks = attribute.val.clusterDim.x;
    } else {
      early = attribute.val.programmaticStreamSerializationAllowed;
    }
  }
  const cuda_shim::ClusterLaunch cluster(blocks);
  cuda_shim::launch(reinterpret_cast<const void*>(kernel), *config,
                    cuda_shim::parameter_bytes<std::decay_t<Params>...>(), [&] {
                      std::apply(kernel, params);
                      if (early) cuda_shim::check_that_previous_kernel_was_awaited();
                    });
  return cudaSuccess;
}

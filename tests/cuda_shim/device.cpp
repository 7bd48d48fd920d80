// The pretended device: attributes, the limits of a launch, errors that the compiler's checks find,
// and the symbols that only CUDA builds of torch export.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <map>

#include "cuda.h"
#include "runtime.h"

namespace cuda_shim {
namespace {

// A small Hopper GPU: few multiprocessors, so that grids have to stride.
std::map<std::string, int> attributes = {
    {"capability_major", 9},        {"capability_minor", 0},
    {"multiprocessors", 4},         {"shared_memory", 0},  // 0: what the capability has
    {"l2_bytes", 50 * 1024 * 1024},
};

int capability() {
  return 10 * attributes.at("capability_major") + attributes.at("capability_minor");
}

constexpr size_t kDefaultShared = 48 * 1024, kMostParameterBytes = 32764;

// Bytes of shared memory that a block can have when a kernel has been allowed them: those of a
// multiprocessor, less a KiB that each block takes besides.
size_t shared_memory() {
  if (const int chosen = attributes.at("shared_memory"); chosen != 0) return chosen;
  static const std::map<int, int> kib = {{70, 96},  {75, 64}, {80, 163}, {86, 99},
                                         {87, 163}, {89, 99}, {90, 227}, {120, 99}};
  return std::prev(kib.upper_bound(capability()))->second * size_t{1024};
}

std::map<const void*, size_t> shared_limits;  // bytes that cudaFuncSetAttribute has allowed
std::map<const char*, size_t> host_memory;    // of cudaHostAlloc, which kernels can reach: bytes
char current_stream;                          // its address stands for torch's stream

// dynamic_shared() begins on 1024 bytes, so a kernel that has it fills its static part up.
size_t static_part(const void* kernel, size_t dynamic_bytes) {
  const size_t bytes = static_shared_bytes(kernel);
  return dynamic_bytes == 0 ? bytes : (bytes + 1023) / 1024 * 1024;
}

}  // namespace

void check_launch(const void* kernel, const cudaLaunchConfig_t& config, size_t parameter_bytes) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    fail("CUDA error: invalid configuration argument: a launch with a wrong block size");
  }
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    fail("CUDA error: invalid configuration argument: a launch with a wrong grid size");
  }
  if (parameter_bytes > kMostParameterBytes) {
    fail("a kernel with " + std::to_string(parameter_bytes) + " bytes of parameters, of which " +
         std::to_string(kMostParameterBytes) + " are allowed");
  }
  check_stream(config.stream);
  const size_t dynamic_bytes = config.dynamicSmemBytes, held = static_part(kernel, dynamic_bytes);
  const auto found = shared_limits.find(kernel);
  const size_t limit = found != shared_limits.end()
                           ? found->second
                           : kDefaultShared - std::min(held, kDefaultShared);
  if (held > kDefaultShared || dynamic_bytes > limit) {
    fail("CUDA error: invalid argument: a launch with " + std::to_string(held) +
         " bytes of static" + " and " + std::to_string(dynamic_bytes) +
         " of dynamic shared memory, of which its kernel" + " allows " + std::to_string(limit));
  }
}

void check_stream(const void* stream) {
  if (stream != &current_stream) fail("work on another stream than torch's current one");
}

void check_pointer(const void* pointer) {
  const auto* at = static_cast<const char*>(pointer);
  const auto after = host_memory.upper_bound(at);
  const bool in_host_memory =
      after != host_memory.begin() && at < std::prev(after)->first + std::prev(after)->second;
  if (pointer != nullptr && !in_host_memory && !is_in_tensor(pointer)) {
    fail("a kernel with a pointer to memory that the device cannot reach");
  }
}

void check_capability(const char* instruction, int least, int most) {
  if (capability() < least || capability() > most) {
    fail(std::string(instruction) + ": no code for a device of compute capability " +
         std::to_string(capability()));
  }
}

}  // namespace cuda_shim

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, const char*> names = {
      {cudaDevAttrComputeCapabilityMajor, "capability_major"},
      {cudaDevAttrComputeCapabilityMinor, "capability_minor"},
      {cudaDevAttrMultiProcessorCount, "multiprocessors"},
      {cudaDevAttrL2CacheSize, "l2_bytes"},
  };
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
               ? static_cast<int>(cuda_shim::shared_memory())
               : cuda_shim::attributes.at(names.at(attribute));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (cuda_shim::static_part(kernel, value) + value > cuda_shim::shared_memory()) {
    cuda_shim::fail(
        "CUDA error: invalid argument: a kernel is allowed more shared memory than the device has");
  }
  cuda_shim::shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const size_t held = cuda_shim::static_part(kernel, config->dynamicSmemBytes);
  const size_t of_block = held + config->dynamicSmemBytes + 1024;
  const int blocks = static_cast<int>((cuda_shim::shared_memory() + 1024) / of_block);
  const int in_cluster = static_cast<int>(config->attrs->val.clusterDim.x);
  // A device has the multiprocessors for one cluster of any size that is allowed.
  *clusters = std::max(1, blocks * cuda_shim::attributes.at("multiprocessors") / in_cluster);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::string(name) != "cuTensorMapEncodeTiled") cuda_shim::fail("an unknown driver's call");
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Matrices of 16-bit elements, in boxes of 128 bytes a row.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0;
  const bool has_sizes = rank == 2 && std::min(sizes[0], sizes[1]) > 0 &&
                         std::max(sizes[0], sizes[1]) <= uint64_t{1} << 32 &&
                         strides[0] >= sizes[0] * 2 && strides[0] < uint64_t{1} << 40;
  const bool has_box = box[0] * 2 == 128 && box[1] > 0 && box[1] <= 256 && steps[0] == 1 &&
                       steps[1] == 1 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (!is_aligned || !has_sizes || !has_box) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint16_t*>(address),
          static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(sizes[0]),
          static_cast<int64_t>(strides[0] / 2),
          static_cast<int>(box[1]),
          static_cast<int>(box[0])};
  return CUDA_SUCCESS;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  cuda_shim::host_memory[static_cast<const char*>(*memory)] = bytes;
  return cudaSuccess;
}

extern "C" {

// Returns the replaced value, -1 for an unknown name.
int shim_set_attribute(const char* name, int value) {
  const auto found = cuda_shim::attributes.find(name);
  return found == cuda_shim::attributes.end() ? -1 : std::exchange(found->second, value);
}

// ---- functions that -fsanitize calls, with data that begins with a place in the source ----

struct SourcePlace {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] static void fail_at(const SourcePlace* place, const char* what) {
  cuda_shim::fail(std::string(place->file) + ":" + std::to_string(place->line) + ": " + what);
}
void __ubsan_handle_type_mismatch_v1_abort(const SourcePlace* place, uintptr_t) {
  fail_at(place, "access to an address that is not aligned for its type");
}
void __ubsan_handle_out_of_bounds_abort(const SourcePlace* place, uintptr_t) {
  fail_at(place, "index outside of an array");
}
void __ubsan_handle_shift_out_of_bounds_abort(const SourcePlace* place, uintptr_t, uintptr_t) {
  fail_at(place, "shift by more bits than the type has");
}

// ---- torch's own: there is no device to choose ----

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &cuda_shim::current_stream;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

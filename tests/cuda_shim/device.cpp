// The pretended device: attributes, the limits of a launch, errors that the compiler's checks find,
// and the symbols that only CUDA builds of torch export.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>

#include "runtime.h"

namespace cuda_shim {
namespace {

// A small Hopper GPU: few multiprocessors, so that grids have to stride.
std::map<std::string, int> attributes = {
    {"capability_major", 9},       {"capability_minor", 0},        {"multiprocessors", 4},
    {"shared_memory", 227 * 1024}, {"l2_bytes", 50 * 1024 * 1024},
};

std::map<const void*, size_t> shared_limits;  // what cudaFuncSetAttribute has allowed

}  // namespace

void check_launch(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    fail("a launch with a wrong block size");
  }
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    fail("a launch with a wrong grid size");
  }
  const auto limit = shared_limits.find(kernel);
  if (shared_bytes > (limit == shared_limits.end() ? 48 * 1024 : limit->second)) {
    fail("a launch with more dynamic shared memory than its kernel allows");
  }
}

}  // namespace cuda_shim

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, const char*> names = {
      {cudaDevAttrComputeCapabilityMajor, "capability_major"},
      {cudaDevAttrComputeCapabilityMinor, "capability_minor"},
      {cudaDevAttrMultiProcessorCount, "multiprocessors"},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared_memory"},
      {cudaDevAttrL2CacheSize, "l2_bytes"},
  };
  *value = cuda_shim::attributes.at(names.at(attribute));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > cuda_shim::attributes.at("shared_memory")) {
    cuda_shim::fail("a kernel is allowed more shared memory than the device has");
  }
  cuda_shim::shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}

extern "C" {

// Returns the value that it replaces, -1 for a name that is none.
int shim_set_attribute(const char* name, int value) {
  const auto found = cuda_shim::attributes.find(name);
  return found == cuda_shim::attributes.end() ? -1 : std::exchange(found->second, value);
}

// ---- what -fsanitize calls, with data that begins with a place in the source ----

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

// ---- torch's own: there is no device and no stream to choose ----

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
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

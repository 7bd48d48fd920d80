// Shared memory, static and dynamic, and the asynchronous copies into it.
//
// A block finds NaN in shared memory. The bytes behind the dynamic part are checked when a block
// has ended.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <deque>
#include <vector>

#include "runtime.h"

extern "C" void* __tls_get_addr(size_t index[2]);

namespace cuda_shim {
namespace {

constexpr size_t kCapacity = 227 * 1024, kCanaryBytes = 4096, kChunk = 16;
// NaN in fp32, fp16 and bf16, and a value that no kernel stores by itself.
constexpr uint16_t kCanary = 0xffa5;
// The dynamic memory of every block of a cluster.
constexpr size_t kBlockBytes = (kCapacity + kCanaryBytes + 1023) / 1024 * 1024;
alignas(1024) unsigned char dynamic_memory[kMaxBlocks][kBlockBytes];
size_t dynamic_bytes = 0;

// Static shared memory: the thread-local variables of the library that holds the kernel.
unsigned char* static_memory = nullptr;
size_t static_bytes = 0;

struct Copy {
  void* dst;
  const void* src;
  int bytes;
};

// A thread's copies in groups, the last of which is not committed yet.
struct Copies {
  std::deque<std::vector<Copy>> groups{1};
  std::vector<size_t> arrived;  // chunks that this thread has not published
};
Copies copies[kMaxThreads * kMaxBlocks];

// The chunks of dynamic memory with a copy that was not published.
bool unpublished[kMaxBlocks][kCapacity / kChunk + 1];

// The chunk at `address`; too large a number outside of dynamic memory.
size_t chunk_of(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - dynamic_shared()) /
         kChunk;
}

uint16_t* canary(int rank) {
  return reinterpret_cast<uint16_t*>(dynamic_memory[rank] + (dynamic_bytes + 1) / 2 * 2);
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kChunk == 0; }

}  // namespace

void use_shared_memory(const void* kernel, size_t bytes) {
  dynamic_bytes = bytes;
  static_bytes = 0;
  Dl_info library;
  if (dladdr(kernel, &library) == 0) fail("a kernel of no library");
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* base) {
        if (reinterpret_cast<void*>(info->dlpi_addr) != base) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          size_t index[2] = {info->dlpi_tls_modid, 0};
          static_memory = static_cast<unsigned char*>(__tls_get_addr(index));
          static_bytes = info->dlpi_phdr[i].p_memsz;
        }
        return 1;
      },
      library.dli_fbase);
}

void fill_shared_memory(int rank) {
  std::memset(dynamic_memory[rank], 0xff, dynamic_bytes);
  std::fill_n(canary(rank), kCanaryBytes / 4, kCanary);
  std::fill_n(unpublished[rank], dynamic_bytes / kChunk + 1, false);
  std::fill_n(static_memory, static_bytes, 0xff);
  const unsigned n_threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned t = 0; t < n_threads; ++t) {
    Copies& own = copies[rank * n_threads + t];
    own.groups.resize(1);
    own.groups.front().clear();
    own.arrived.clear();
  }
}

std::string shared_memory_overrun(int rank) {
  const uint16_t *begin = canary(rank), *end = begin + kCanaryBytes / 4;
  const uint16_t* found = std::find_if(begin, end, [](uint16_t word) { return word != kCanary; });
  if (found == end) return "";
  return "dynamic shared memory is overrun: byte " +
         std::to_string(dynamic_bytes + 2 * (found - begin)) + " of " +
         std::to_string(dynamic_bytes) + " was written";
}

unsigned char* dynamic_shared() { return dynamic_memory[cluster_rank()]; }

void* in_block(void* own, int rank) {
  const auto offset = static_cast<unsigned char*>(own) - dynamic_shared();
  if (offset < 0 || static_cast<size_t>(offset) >= dynamic_bytes) {
    fail("an address of another block that is none of dynamic shared memory");
  }
  if (rank < 0 || rank >= cluster_size()) fail("a block that the cluster does not have");
  return dynamic_memory[rank] + offset;
}

bool is_shared(const void* address, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto inside = [&](const unsigned char* begin, size_t size) {
    return at >= begin && at + bytes <= begin + size;
  };
  return inside(dynamic_shared(), dynamic_bytes) || inside(static_memory, static_bytes);
}

void copy_async(void* dst, const void* src, int bytes) {
  if (!is_aligned(dst) || !is_aligned(src)) {
    fail("cp.async with an address that is not a multiple of 16");
  }
  if (!is_shared(dst, kChunk)) fail("cp.async to outside of shared memory");
  if (is_shared(src, 1) || is_local(src)) fail("cp.async from outside of global memory");
  check_capability("cp.async", 80);
  if (bytes < 0 || bytes > 16) fail("cp.async of a number of bytes that is not in 0..16");
  std::memset(dst, 0xff, kChunk);
  copies[current_thread()].groups.back().push_back({dst, src, bytes});
  if (chunk_of(dst) < dynamic_bytes / kChunk) unpublished[cluster_rank()][chunk_of(dst)] = true;
}

void copy_async_commit() { copies[current_thread()].groups.emplace_back(); }

void copy_async_wait(int pending) {
  Copies& own = copies[current_thread()];
  for (; static_cast<int>(own.groups.size()) > pending + 1; own.groups.pop_front()) {
    for (const Copy& copy : own.groups.front()) {
      std::memset(copy.dst, 0, kChunk);
      std::memcpy(copy.dst, copy.src, copy.bytes);
      if (chunk_of(copy.dst) < dynamic_bytes / kChunk) own.arrived.push_back(chunk_of(copy.dst));
    }
  }
}

void publish_copies() {
  auto& arrived = copies[current_thread()].arrived;
  for (size_t chunk : arrived) unpublished[cluster_rank()][chunk] = false;
  arrived.clear();
}

bool is_published(const void* address) {
  const size_t chunk = chunk_of(address);
  return chunk >= dynamic_bytes / kChunk || !unpublished[cluster_rank()][chunk];
}

}  // namespace cuda_shim

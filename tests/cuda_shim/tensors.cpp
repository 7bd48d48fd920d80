// The memory of torch's CPU tensors as the device's: an allocator that shows accesses outside of
// tensors, and a lock that shows reads of device memory by the host's code.
//
// Every tensor ends at a page that cannot be touched, another lies before it, and new memory holds
// NaN. Between launches no tensor can be touched either: the handler of an access lets torch's own
// functions pass, which stand for torch's kernels, and remembers any other access.
#undef TORCH_TARGET_VERSION  // allocators are no part of torch's stable interface
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "runtime.h"

namespace {

// Vector loads need this alignment, so up to 15 bytes after a tensor can be touched unseen.
constexpr size_t kAlignment = 16;

size_t page_bytes() {
  static const size_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

// Begin and size of every tensor's pages, without the two around them.
std::map<char*, size_t> tensors;
std::mutex mutex;
bool on_device = false;  // tensors belong to the device: `call` of cuda_shim.py is running
bool touched_by_host = false;

void protect(int access) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [begin, bytes] : tensors) mprotect(begin, bytes, access);
}

void free_pages(void* begin) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = tensors.find(static_cast<char*>(begin));
  munmap(found->first - page_bytes(), found->second + 2 * page_bytes());
  tensors.erase(found);
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t page = page_bytes();
    const size_t padded = (n + kAlignment - 1) / kAlignment * kAlignment;
    const size_t usable = (padded + page - 1) / page * page;
    void* memory = mmap(nullptr, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for a guarded tensor");
    char* begin = static_cast<char*>(memory) + page;
    mprotect(begin, usable, PROT_READ | PROT_WRITE);
    std::memset(begin, 0xff, usable);
    const std::lock_guard<std::mutex> lock(mutex);
    tensors[begin] = usable;
    return {begin + usable - padded, begin, &free_pages, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

GuardedAllocator guarded;
c10::Allocator* replaced = nullptr;
struct sigaction old_action;

// Whether the instruction is one of a .cu file's host code.
bool is_in_kernels(const ucontext_t& context) {
#if defined(__x86_64__)
  void* instruction = reinterpret_cast<void*>(context.uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  void* instruction = reinterpret_cast<void*>(context.uc_mcontext.pc);
#endif
  Dl_info here, library;
  return dladdr(instruction, &library) != 0 &&
         dladdr(reinterpret_cast<void*>(&is_in_kernels), &here) != 0 &&
         std::strstr(library.dli_fname, "/cuda_shim/") != nullptr &&
         std::strcmp(here.dli_fname, library.dli_fname) != 0;
}

void handle_access(int signal, siginfo_t* info, void* context) {
  auto* at = static_cast<char*>(info->si_addr);
  const auto after = tensors.upper_bound(at);
  if (after == tensors.begin() || at >= std::prev(after)->first + std::prev(after)->second) {
    sigaction(signal, &old_action, nullptr);  // no tensor's fault: it comes again
    return;
  }
  const auto& [begin, bytes] = *std::prev(after);
  if (is_in_kernels(*static_cast<ucontext_t*>(context))) touched_by_host = true;
  mprotect(begin, bytes, PROT_READ | PROT_WRITE);
}

}  // namespace

namespace cuda_shim {

void lock_tensors() {
  if (on_device) protect(PROT_NONE);
}
void unlock_tensors() {
  if (on_device) protect(PROT_READ | PROT_WRITE);
}

bool is_in_tensor(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* at = const_cast<char*>(static_cast<const char*>(address));
  const auto after = tensors.upper_bound(at);
  return after != tensors.begin() && at <= std::prev(after)->first + std::prev(after)->second;
}

}  // namespace cuda_shim

extern "C" {

// New tensors are guarded ones.
void shim_guard_memory(bool on) {
  if (on) replaced = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : replaced);
}

// Guarded tensors belong to the device from here on.
void shim_enter_device() {
  struct sigaction action = {};
  action.sa_sigaction = &handle_access;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_action);
  touched_by_host = false;
  on_device = true;
  cuda_shim::lock_tensors();
}

// Ends the device's ownership; returns whether host code of a .cu file has touched a tensor.
bool shim_leave_device() {
  cuda_shim::unlock_tensors();
  on_device = false;
  sigaction(SIGSEGV, &old_action, nullptr);
  return touched_by_host;
}
}

// An allocator for torch's CPU tensors that shows accesses outside of them: every tensor ends at a
// page that cannot be touched, another lies before it, and new memory holds NaN.
#undef TORCH_TARGET_VERSION  // allocators are no part of torch's stable interface
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace {

// Vector loads need this alignment, so up to 15 bytes after a tensor can be touched unseen.
constexpr size_t kAlignment = 16;

struct Pages {
  char* begin;
  size_t bytes;
};

void free_pages(void* pages) {
  auto* owned = static_cast<Pages*>(pages);
  munmap(owned->begin, owned->bytes);
  delete owned;
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t padded = (n + kAlignment - 1) / kAlignment * kAlignment;
    const size_t usable = (padded + page - 1) / page * page;
    void* memory = mmap(nullptr, usable + 2 * page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for a guarded tensor");
    auto* begin = static_cast<char*>(memory);
    mprotect(begin, page, PROT_NONE);
    mprotect(begin + page + usable, page, PROT_NONE);
    std::memset(begin + page, 0xff, usable);
    char* data = begin + page + usable - padded;
    return {data, new Pages{begin, usable + 2 * page}, &free_pages,
            c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

GuardedAllocator guarded;
c10::Allocator* replaced = nullptr;

}  // namespace

extern "C" void shim_guard_memory(bool on) {
  if (on) replaced = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : replaced);
}

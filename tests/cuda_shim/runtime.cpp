// The scheduler of fibres, shared memory, and the symbols that only CUDA builds of torch export.
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_shim {

uint64_t block_number = 0;

namespace {

// ---- what tests can set ----

std::map<std::string, int> attributes = {
    {"capability_major", 9},       {"capability_minor", 0},        {"multiprocessors", 4},
    {"shared_memory", 227 * 1024}, {"l2_bytes", 50 * 1024 * 1024},
};

// The order of fibres and of blocks: 0 forward, 1 reverse, else shuffled with this seed.
int order_seed = 0;

std::vector<int64_t> ordered(int64_t n, std::mt19937& random) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// ---- fibres ----

struct Copy {
  void* dst;
  const void* src;
  int bytes;
};

enum class State { kReady, kAtBarrier, kInCollective, kExited };

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

struct Fibre {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;
  State state = State::kExited;
  int thread;  // in the block
  uint3 index;
  // Where it waits, and with what.
  const char* waits_for = nullptr;
  unsigned mask = 0;
  int result = 0;
  // Groups of copies that are committed, and the one that is not.
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
  std::vector<size_t> unpublished;
};

// Lanes of a warp on their way into a collective.
struct Meeting {
  const char* name;
  unsigned mask, arrived;
  Lanes lanes;
};

bool same(const char* name, const char* other) {
  return name == other || std::strcmp(name, other) == 0;
}

constexpr int kMaxThreads = 1024;
Fibre fibres[kMaxThreads];
std::vector<Meeting> warps[kMaxThreads / kLanes];
const char* barrier_name = nullptr;
int barrier_arrived = 0, barrier_sum = 0;
jmp_buf scheduler;
Fibre* current = nullptr;  // null on the host
int n_threads = 0;
const std::function<void()>* thread_body = nullptr;
std::string error;

std::string text_of(const uint3& index) {
  std::ostringstream text;
  text << "(" << index.x << "," << index.y << "," << index.z << ")";
  return text.str();
}

void leave_fibre() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

// A fibre stays in here for good: it runs one thread after the other.
void fibre_main() {
  while (true) {
    (*thread_body)();
    current->state = State::kExited;
    leave_fibre();
  }
}

void start_fibre(Fibre& fibre) {
  if (fibre.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    fibre.stack = static_cast<char*>(memory);
    mprotect(memory, kPage, PROT_NONE);  // a stack that overflows must not reach the next one
  }
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fibre_main, 0);
  fibre.started = true;
  setcontext(&context);
}

void enter_fibre(Fibre& fibre) {
  current = &fibre;
  threadIdx = fibre.index;
  if (_setjmp(scheduler) == 0) {
    if (!fibre.started) start_fibre(fibre);
    _longjmp(fibre.context, 1);
  }
  current = nullptr;
}

// ---- shared memory ----

constexpr size_t kSharedCapacity = 227 * 1024, kCanaryBytes = 4096;
// NaN in fp32, fp16 and bf16, and no value that a kernel stores by itself.
constexpr uint16_t kCanary = 0xffa5;
alignas(1024) unsigned char shared_memory[kSharedCapacity + kCanaryBytes];
size_t shared_bytes = 0;
bool unpublished[kSharedCapacity / 16 + 1];  // of each 16 bytes

// Static shared memory: the thread-local variables of the library that holds the kernel.
unsigned char* static_shared = nullptr;
size_t static_shared_bytes = 0;

extern "C" void* __tls_get_addr(size_t index[2]);

void find_static_shared(const void* kernel) {
  Dl_info library;
  static_shared = nullptr;
  static_shared_bytes = 0;
  if (dladdr(kernel, &library) == 0) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* base) {
        if (reinterpret_cast<void*>(info->dlpi_addr) != base) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          size_t index[2] = {info->dlpi_tls_modid, 0};
          static_shared = static_cast<unsigned char*>(__tls_get_addr(index));
          static_shared_bytes = info->dlpi_phdr[i].p_memsz;
        }
        return 1;
      },
      library.dli_fbase);
}

// Which 16 bytes of the dynamic shared memory; too large a number for others.
size_t chunk_of(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared_memory) / 16;
}

uint16_t* canary() {
  return reinterpret_cast<uint16_t*>(shared_memory + (shared_bytes + 1) / 2 * 2);
}

void fill_shared_memory() {
  std::memset(shared_memory, 0xff, shared_bytes);
  std::fill_n(unpublished, shared_bytes / 16 + 1, false);
  std::fill_n(canary(), kCanaryBytes / 4, kCanary);
  if (static_shared_bytes > 0) std::memset(static_shared, 0xff, static_shared_bytes);
}

void check_canary() {
  const uint16_t* begin = canary();
  for (size_t i = 0; i < kCanaryBytes / 4; ++i) {
    if (begin[i] == kCanary) continue;
    std::ostringstream text;
    text << "block " << text_of(blockIdx) << ": dynamic shared memory is overrun: byte "
         << shared_bytes + 2 * i << " of " << shared_bytes << " was written";
    fail(text.str());
  }
}

// ---- accesses outside of all memory ----

// While a kernel runs, it alone touches tensors, and a bad access ends its launch and not the
// process.
class KernelAccess {
 public:
  KernelAccess() {
    unlock_tensors();
    static char stack[64 * 1024];  // the fault may be that a fibre's stack is full
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~KernelAccess() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
    lock_tensors();
  }

 private:
  static void handle(int signal, siginfo_t* info, void*) {
    if (current == nullptr) {
      sigaction(signal, &old_action_, nullptr);  // not a kernel's: it comes again
      return;
    }
    const auto* at = static_cast<const char*>(info->si_addr);
    const bool in_stack = at >= current->stack && at < current->stack + kPage;
    fail(in_stack ? "local variables need more stack than the shim gives a thread"
                  : "access to an address outside of all tensors and shared memory");
  }

  stack_t old_stack_ = {};
  static inline struct sigaction old_action_ = {};
};

// ---- one block ----

std::string describe_waiting() {
  std::map<std::string, int> counts;
  for (int t = 0; t < n_threads; ++t) {
    const Fibre& fibre = fibres[t];
    std::ostringstream where;
    if (fibre.state == State::kExited) {
      where << "have exited";
    } else {
      where << "wait in " << fibre.waits_for;
      if (fibre.state == State::kInCollective) where << " with mask 0x" << std::hex << fibre.mask;
    }
    ++counts[where.str()];
  }
  std::string text;
  for (const auto& [where, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + where;
  }
  return text;
}

void run_block(std::mt19937& random) {
  ++block_number;
  for (int t = 0; t < n_threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.thread = t;
    if (fibre.state != State::kExited) fibre.started = false;  // an error left it in a kernel
    const unsigned row = t / blockDim.x;
    fibre.index = {t % blockDim.x, row % blockDim.y, row / blockDim.y};
    fibre.state = State::kReady;
    fibre.groups.clear();
    fibre.open_group.clear();
    fibre.unpublished.clear();
  }
  for (auto& meetings : warps) meetings.clear();
  barrier_arrived = barrier_sum = 0;
  fill_shared_memory();
  bool progress = true;
  while (progress) {
    progress = false;
    for (int64_t t : ordered(n_threads, random)) {
      if (fibres[t].state != State::kReady) continue;
      progress = true;
      enter_fibre(fibres[t]);
      if (!error.empty()) fail(std::exchange(error, {}));
    }
  }
  const auto exited = [](const Fibre& fibre) { return fibre.state == State::kExited; };
  if (!std::all_of(fibres, fibres + n_threads, exited)) {
    fail("block " + text_of(blockIdx) +
         ": threads wait for others that never come: " + describe_waiting());
  }
  check_canary();
}

}  // namespace

// ---- what kernels call ----

void fail(const std::string& what) {
  if (current == nullptr) throw std::runtime_error("CUDA shim: " + what);
  error = "block " + text_of(blockIdx) + ", thread " + text_of(threadIdx) + ": " + what;
  _longjmp(scheduler, 1);
}

int lane() { return current->thread % kLanes; }

int block_barrier(const char* name, bool predicate) {
  current->state = State::kAtBarrier;
  current->waits_for = name;
  if (barrier_arrived == 0) barrier_name = name;
  if (!same(barrier_name, name)) {
    fail(std::string("threads meet in different barriers: ") + barrier_name + ", " + name);
  }
  barrier_sum += predicate;
  if (++barrier_arrived < n_threads) {
    leave_fibre();
  } else {
    for (int t = 0; t < n_threads; ++t) {
      fibres[t].state = State::kReady;
      fibres[t].result = barrier_sum;
    }
    barrier_arrived = barrier_sum = 0;
  }
  return current->result;
}

void warp_collective(const char* name, unsigned mask, void* operand,
                     void (*complete)(const Lanes&)) {
  const unsigned own = 1u << lane();
  if ((mask & own) == 0) fail(std::string(name) + " by a lane outside of its mask");
  current->state = State::kInCollective;
  current->waits_for = name;
  current->mask = mask;
  // Lanes of one warp may wait in several collectives, of masks that do not overlap.
  auto& meetings = warps[current->thread / kLanes];
  auto meeting = std::find_if(meetings.begin(), meetings.end(),
                              [&](const Meeting& other) { return (other.mask & mask) != 0; });
  if (meeting == meetings.end()) {
    meeting = meetings.insert(meetings.end(), Meeting{name, mask, 0, {}});
  } else if (meeting->mask != mask || !same(meeting->name, name)) {
    fail("lanes of a warp meet in different collectives: " + describe_waiting());
  }
  meeting->arrived |= own;
  meeting->lanes.operand[lane()] = operand;
  if (meeting->arrived != mask) return leave_fibre();
  complete(meeting->lanes);
  meetings.erase(meeting);
  Fibre* const first = current - lane();
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) first[i].state = State::kReady;
  }
}

unsigned char* dynamic_shared() { return shared_memory; }

bool is_shared(const void* address, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto inside = [&](const unsigned char* begin, size_t size) {
    return at >= begin && at + bytes <= begin + size;
  };
  return inside(shared_memory, shared_bytes) || inside(static_shared, static_shared_bytes);
}

void copy_async(void* dst, const void* src, int bytes) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (!aligned(dst) || !aligned(src)) {
    fail("cp.async with an address that is not a multiple of 16");
  }
  if (!is_shared(dst, 16)) fail("cp.async to outside of shared memory");
  if (bytes < 0 || bytes > 16) fail("cp.async of more than 16 bytes");
  std::memset(dst, 0xff, 16);
  current->open_group.push_back({dst, src, bytes});
  if (chunk_of(dst) < shared_bytes / 16) unpublished[chunk_of(dst)] = true;
}

void copy_async_commit() {
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
}

void copy_async_wait(int pending) {
  auto& groups = current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.dst, 0, 16);
      std::memcpy(copy.dst, copy.src, copy.bytes);
      if (chunk_of(copy.dst) < shared_bytes / 16) {
        current->unpublished.push_back(chunk_of(copy.dst));
      }
    }
  }
}

void publish_copies() {
  for (size_t chunk : current->unpublished) unpublished[chunk] = false;
  current->unpublished.clear();
}

bool is_published(const void* address) {
  const size_t chunk = chunk_of(address);
  return chunk >= shared_bytes / 16 || !unpublished[chunk];
}

void multiply_16x8x16(float (&sum)[16][8], const float (&left)[16][16],
                      const float (&right)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
    }
  }
}

// ---- launching ----

namespace {

std::map<const void*, int> shared_limits;  // what cudaFuncSetAttribute has allowed

void check_launch(const void* kernel, const dim3& grid, const dim3& block, size_t bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    fail("a launch with a wrong block size");
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    fail("a launch with a wrong grid size");
  }
  const auto limit = shared_limits.find(kernel);
  if (bytes > static_cast<size_t>(limit == shared_limits.end() ? 48 * 1024 : limit->second)) {
    fail("a launch with more dynamic shared memory than its kernel allows");
  }
}

}  // namespace

void launch(const void* kernel, const dim3& grid, const dim3& block, size_t bytes,
            const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  check_launch(kernel, grid, block, bytes);
  gridDim = grid;
  blockDim = block;
  shared_bytes = bytes;
  thread_body = &thread;
  n_threads = static_cast<int>(block.x * block.y * block.z);
  find_static_shared(kernel);
  const KernelAccess access;
  std::mt19937 random(order_seed);
  const int64_t layer = int64_t{grid.x} * grid.y;
  const int64_t n_blocks = layer * grid.z;
  for (int64_t b : ordered(n_blocks, random)) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b % layer / grid.x),
                static_cast<unsigned>(b / layer)};
    run_block(random);
  }
}

}  // namespace cuda_shim

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using cuda_shim::attributes;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = attributes.at("capability_major");
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = attributes.at("capability_minor");
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = attributes.at("multiprocessors");
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = attributes.at("shared_memory");
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = attributes.at("shared_memory") + 1024;
      break;
    case cudaDevAttrL2CacheSize:
      *value = attributes.at("l2_bytes");
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
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

// ---- what Python calls ----

extern "C" {

void shim_set_order(int seed) { cuda_shim::order_seed = seed; }

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

[[noreturn]] void fail_at(const SourcePlace* place, const char* what) {
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

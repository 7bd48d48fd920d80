// Runs the threads of a launch: fibres, barriers, collectives, launching.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_shim {

uint64_t block_number = 0;

namespace {

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
  uint64_t waited_in = 0;  // the block in which it has waited for the previous kernel
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
  if (const std::string overrun = shared_memory_overrun(); !overrun.empty()) {
    fail("block " + text_of(blockIdx) + ": " + overrun);
  }
}

}  // namespace

// ---- what kernels call ----

void fail(const std::string& what) {
  if (current == nullptr) throw std::runtime_error("CUDA shim: " + what);
  error = "block " + text_of(blockIdx) + ", thread " + text_of(threadIdx) + ": " + what;
  _longjmp(scheduler, 1);
}

int current_thread() { return current->thread; }

int lane() { return current->thread % kLanes; }

void wait_for_previous_kernel() { current->waited_in = block_number; }

void check_that_previous_kernel_was_awaited() {
  if (current->waited_in != block_number) {
    fail("a kernel that starts early does not wait for the previous one");
  }
}

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

void multiply_16x8x16(float (&sum)[16][8], const float (&left)[16][16],
                      const float (&right)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
    }
  }
}

void launch(const void* kernel, const dim3& grid, const dim3& block, size_t bytes,
            const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  check_launch(kernel, grid, block, bytes);
  gridDim = grid;
  blockDim = block;
  thread_body = &thread;
  n_threads = static_cast<int>(block.x * block.y * block.z);
  use_shared_memory(kernel, bytes);
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

extern "C" void shim_set_order(int seed) { cuda_shim::order_seed = seed; }

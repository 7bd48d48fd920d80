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
  int thread, rank;  // in the block, and the block's in its cluster
  uint3 index;
  // The place where the fibre waits, and its operands.
  const char* waits_for = nullptr;
  unsigned mask = 0;
  int result = 0;
  uint64_t waited_in = 0;  // the block in which the fibre waited for the previous kernel
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

// A block of the cluster that runs: its place, its warps' collectives, its barrier.
struct Block {
  uint3 index;
  std::vector<Meeting> warps[kMaxThreads / kLanes];
  const char* barrier_name = nullptr;
  int arrived = 0, sum = 0;
};

Fibre fibres[kMaxThreads * kMaxBlocks];
Block blocks[kMaxBlocks];
int n_blocks_in_cluster = 1, cluster_arrived = 0;
jmp_buf scheduler;
Fibre* current = nullptr;  // null on the host
int n_threads = 0;         // of a block
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

// A fibre never leaves this function: it runs one thread after the other.
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
  blockIdx = blocks[fibre.rank].index;
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
    static char stack[64 * 1024];  // a full stack of a fibre may be the fault
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
      sigaction(signal, &old_action_, nullptr);  // no kernel's fault: it comes again
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
  for (int t = 0; t < n_threads * n_blocks_in_cluster; ++t) {
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

// Runs the cluster of which blockIdx is the first block; without clusters, that block.
void run_cluster(std::mt19937& random) {
  ++block_number;
  const uint3 first = blockIdx;
  for (int rank = 0; rank < n_blocks_in_cluster; ++rank) {
    Block& block = blocks[rank];
    block.index = {first.x + static_cast<unsigned>(rank), first.y, first.z};
    for (auto& meetings : block.warps) meetings.clear();
    block.arrived = block.sum = 0;
    fill_shared_memory(rank);
    for (int t = 0; t < n_threads; ++t) {
      Fibre& fibre = fibres[rank * n_threads + t];
      fibre.thread = t;
      fibre.rank = rank;
      if (fibre.state != State::kExited) fibre.started = false;  // an error left it in a kernel
      const unsigned row = t / blockDim.x;
      fibre.index = {t % blockDim.x, row % blockDim.y, row / blockDim.y};
      fibre.state = State::kReady;
    }
  }
  cluster_arrived = 0;
  forget_barriers();
  const int n_fibres = n_threads * n_blocks_in_cluster;
  bool progress = true;
  while (progress) {
    progress = false;
    for (int64_t t : ordered(n_fibres, random)) {
      if (fibres[t].state != State::kReady) continue;
      progress = true;
      enter_fibre(fibres[t]);
      if (!error.empty()) fail(std::exchange(error, {}));
    }
    // Copies are made as late as the code allows: when no thread can go on without them.
    if (!progress) progress = deliver_copies();
  }
  const auto exited = [](const Fibre& fibre) { return fibre.state == State::kExited; };
  if (!std::all_of(fibres, fibres + n_fibres, exited)) {
    fail("block " + text_of(first) +
         ": threads wait for others that never come: " + describe_waiting());
  }
  for (int rank = 0; rank < n_blocks_in_cluster; ++rank) {
    if (const std::string overrun = shared_memory_overrun(rank); !overrun.empty()) {
      fail("block " + text_of(blocks[rank].index) + ": " + overrun);
    }
  }
}

}  // namespace

// ---- functions that kernels call ----

void fail(const std::string& what) {
  if (current == nullptr) throw std::runtime_error("CUDA shim: " + what);
  error = "block " + text_of(blockIdx) + ", thread " + text_of(threadIdx) + ": " + what;
  _longjmp(scheduler, 1);
}

int current_thread() { return static_cast<int>(current - fibres); }

int lane() { return current->thread % kLanes; }

void wait_for_previous_kernel() { current->waited_in = block_number; }

void check_that_previous_kernel_was_awaited() {
  if (current->waited_in != block_number) {
    fail("a kernel that starts early does not wait for the previous one");
  }
}

int block_barrier(const char* name, bool predicate) {
  Block& block = blocks[current->rank];
  current->state = State::kAtBarrier;
  current->waits_for = name;
  if (block.arrived == 0) block.barrier_name = name;
  if (!same(block.barrier_name, name)) {
    fail(std::string("threads meet in different barriers: ") + block.barrier_name + ", " + name);
  }
  block.sum += predicate;
  if (++block.arrived < n_threads) {
    leave_fibre();
  } else {
    Fibre* const first = current - current->thread;
    for (int t = 0; t < n_threads; ++t) {
      first[t].state = State::kReady;
      first[t].result = block.sum;
    }
    block.arrived = block.sum = 0;
  }
  return current->result;
}

// ---- clusters ----

int cluster_rank() { return current == nullptr ? 0 : current->rank; }

int cluster_size() { return n_blocks_in_cluster; }

ClusterLaunch::ClusterLaunch(int blocks) {
  if (blocks < 1 || blocks > kMaxBlocks) fail("a cluster of more than 8 blocks");
  n_blocks_in_cluster = blocks;
}
ClusterLaunch::~ClusterLaunch() { n_blocks_in_cluster = 1; }

void cluster_barrier() {
  current->state = State::kAtBarrier;
  current->waits_for = "barrier.cluster";
  if (++cluster_arrived < n_threads * n_blocks_in_cluster) return leave_fibre();
  for (int t = 0; t < n_threads * n_blocks_in_cluster; ++t) fibres[t].state = State::kReady;
  cluster_arrived = 0;
}

void wait_until_woken(const char* name, std::vector<int>& sleepers) {
  sleepers.push_back(current_thread());
  current->state = State::kAtBarrier;
  current->waits_for = name;
  leave_fibre();
}

void wake(std::vector<int>& sleepers) {
  for (int fibre : sleepers) fibres[fibre].state = State::kReady;
  sleepers.clear();
}

void warp_collective(const char* name, unsigned mask, void* operand,
                     void (*complete)(const Lanes&)) {
  const unsigned own = 1u << lane();
  if ((mask & own) == 0) fail(std::string(name) + " by a lane outside of its mask");
  current->state = State::kInCollective;
  current->waits_for = name;
  current->mask = mask;
  // Lanes of one warp may wait in several collectives, of masks that do not overlap.
  auto& meetings = blocks[current->rank].warps[current->thread / kLanes];
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

// Adds as Hopper's tensor cores do: the sum and 16 exact products are aligned to the largest of
// them. Bits 25 binary places or more behind its first bit are cut off, and so are bits of the sum
// that do not fit fp32 (Fasi et al., "Numerical behavior of NVIDIA tensor cores", and later
// measurements).
void multiply_16x8x16(float (&sum)[16][8], const float (&left)[16][16],
                      const float (&right)[16][8]) {
  constexpr int kColumns = 8, kPlaces = 25, kLeastExponent = 30, kNotFinite = 255;
  for (int i = 0; i < 16; ++i) {
    float terms[17][kColumns];
    unsigned largest[kColumns] = {};  // the bits of the largest size
    for (int j = 0; j < kColumns; ++j) terms[16][j] = sum[i][j];
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < kColumns; ++j) terms[k][j] = left[i][k] * right[k][j];
    }
    for (const auto& row : terms) {
      for (int j = 0; j < kColumns; ++j) {
        largest[j] = std::max(largest[j], __float_as_uint(row[j]) & 0x7fffffffu);
      }
    }
    if (*std::max_element(largest, largest + kColumns) >> 23 == kNotFinite) {
      for (int j = 0; j < kColumns; ++j) {
        for (int k = 0; k < 16; ++k) sum[i][j] += terms[k][j];
      }
      continue;
    }
    float scale[kColumns];  // turns the kept bits into whole numbers of less than 2^26
    int total[kColumns] = {};
    for (int j = 0; j < kColumns; ++j) {
      const unsigned exponent = std::max<unsigned>(largest[j] >> 23, kLeastExponent);
      scale[j] = __uint_as_float((127 + 127 + kPlaces - exponent) << 23);
    }
    for (const auto& row : terms) {
      for (int j = 0; j < kColumns; ++j) total[j] += static_cast<int>(row[j] * scale[j]);
    }
    for (int j = 0; j < kColumns; ++j) {
      const unsigned size = static_cast<unsigned>(std::abs(total[j]));
      const int cut = std::max(0, 8 - __clz(static_cast<int>(size)));
      const float kept = static_cast<float>(size >> cut << cut) / scale[j];
      sum[i][j] = total[j] < 0 ? -kept : kept;
    }
  }
}

void enter_kernel(int max_threads, int, int) {
  // Registers that a compiler may give a thread without bounds; a block has 64 K of them.
  constexpr int kMostRegisters = 255, kRegisters = 64 * 1024;
  if (max_threads > 0 && n_threads > max_threads) {
    fail("a launch of " + std::to_string(n_threads) + " threads a block of a kernel with " +
         "__launch_bounds__(" + std::to_string(max_threads) + ")");
  }
  if (max_threads == 0 && n_threads * kMostRegisters > kRegisters) {
    fail("a launch of " + std::to_string(n_threads) + " threads a block of a kernel without " +
         "__launch_bounds__: too many resources requested for launch, if it takes 255 registers");
  }
}

bool is_local(const void* address) {
  const auto* at = static_cast<const char*>(address);
  return current != nullptr && at >= current->stack && at < current->stack + kStackBytes;
}

void launch(const void* kernel, const cudaLaunchConfig_t& config, size_t parameter_bytes,
            const std::function<void()>& thread) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  check_launch(kernel, config, parameter_bytes);
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  gridDim = grid;
  blockDim = block;
  thread_body = &thread;
  n_threads = static_cast<int>(block.x * block.y * block.z);
  use_shared_memory(kernel, config.dynamicSmemBytes);
  const KernelAccess access;
  std::mt19937 random(order_seed);
  if (grid.x % n_blocks_in_cluster != 0) fail("a grid that clusters do not divide");
  if (n_blocks_in_cluster > 1 && static_shared_bytes(kernel) > 0) {
    fail("static shared memory in clusters is not emulated");
  }
  const int64_t row = grid.x / n_blocks_in_cluster, layer = row * grid.y;
  for (int64_t c : ordered(layer * grid.z, random)) {
    blockIdx = {static_cast<unsigned>(c % row * n_blocks_in_cluster),
                static_cast<unsigned>(c % layer / row), static_cast<unsigned>(c / layer)};
    run_cluster(random);
  }
}

}  // namespace cuda_shim

extern "C" void shim_set_order(int seed) { cuda_shim::order_seed = seed; }

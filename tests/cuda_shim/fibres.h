// Threads of a block as fibres on one thread of the host: the base of cuda_runtime.h and
// cuda/intrinsics.cuh of this folder.
//
// A fibre runs until it waits: at a barrier of the block, or at a collective of its warp. Behaviour
// that a GPU leaves undefined ends the launch with an error that names block and thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3;
struct cudaLaunchConfig_t;

namespace cuda_shim {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
// Threads of a block; blocks of a cluster.
inline constexpr int kMaxThreads = 1024, kMaxBlocks = 8;

// The running thread's number in its cluster.
int current_thread();

// Ends the launch (or, on the host, the call) with an error.
[[noreturn]] void fail(const std::string& what);

// Runs `thread` once for every thread of every block, unless the device would refuse the launch.
// `kernel` tells kernels apart.
void launch(const void* kernel, const cudaLaunchConfig_t& config, size_t parameter_bytes,
            const std::function<void()>& thread);

// Fail where a kernel was given a pointer to memory that no device can reach, or where a call was
// given another stream than torch's current one, which nothing orders with torch's own work.
void check_pointer(const void* pointer);
void check_stream(const void* stream);

// The first call of every kernel: its launch bounds, 0 where it has none.
void enter_kernel(int max_threads = 0, int min_blocks = 0, int max_blocks_in_cluster = 0);

// Fails where the device, of ten times the major plus the minor compute capability, has no code
// for an instruction.
void check_capability(const char* instruction, int least, int most = 999);

// Waits for all threads of the block; returns the number of threads that gave a `predicate`.
int block_barrier(const char* name, bool predicate);

// The operands of a warp's lanes in a collective, null for lanes that take no part.
struct Lanes {
  void* operand[kLanes];

  template <class T>
  T& of(int lane) const {
    return *static_cast<T*>(operand[lane]);
  }
};

// Waits until every lane of `mask` has called the collective `name` with this mask; the last one
// calls `complete`, which may write to the operands of all.
void warp_collective(const char* name, unsigned mask, void* operand,
                     void (*complete)(const Lanes&));

int lane();

// The block's dynamic shared memory, and whether bytes are in shared memory of any kind.
unsigned char* dynamic_shared();
bool is_shared(const void* address, size_t bytes);

// cp.async: a copy is made when its thread waits for its group, and until then `dst` holds NaN.
void copy_async(void* dst, const void* src, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// fence.proxy.async: shows this thread's copies to instructions that read shared memory on their
// own; and whether the copy to `address`, if there was one, has been shown.
void publish_copies();
bool is_published(const void* address);

// griddepcontrol.wait: every thread of a kernel that may start before the previous kernel has ended
// must call it, or the next kernel could start before the previous one has ended.
void wait_for_previous_kernel();
void check_that_previous_kernel_was_awaited();

// Clusters of blocks. A ClusterLaunch sets the size of a launch's clusters while it lives. In
// kernels there are the block's place in its cluster, the address in block `rank` that corresponds
// to one in the block's own dynamic shared memory, and a barrier of all threads.
class ClusterLaunch {
 public:
  explicit ClusterLaunch(int blocks);
  ~ClusterLaunch();
};
int cluster_rank();
int cluster_size();
void* in_block(void* own, int rank);
void cluster_barrier();

// Barriers in dynamic shared memory: a phase ends when all arrivals and all bytes that were
// expected have come. A wait is for the end of the phase of that parity.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);

// A copy of `bytes` to dynamic shared memory that arrives at `barrier`. It is made by `copy` when
// no thread can go on without it.
void copy_later(void* to, int bytes, uint64_t* barrier, std::function<void()> copy);

// Counts blocks over all launches: state that a thread remembers must not outlive its block.
extern uint64_t block_number;

// sum += left right, of a warp's matrix instruction.
void multiply_16x8x16(float (&sum)[16][8], const float (&left)[16][16],
                      const float (&right)[16][8]);

}  // namespace cuda_shim

// Threads of a block as fibres on one thread of the host: what cuda_runtime.h and
// cuda/intrinsics.cuh of this folder are made of.
//
// A fibre runs until it waits: at a barrier of the block, or at a collective of its warp. Whatever
// a GPU would leave undefined there ends the launch with an error that names block and thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3;

namespace cuda_shim {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Ends the launch (or, on the host, the call) with an error.
[[noreturn]] void fail(const std::string& what);

// Runs `thread` once for every thread of every block. `kernel` tells kernels apart.
void launch(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes,
            const std::function<void()>& thread);

// Waits for all threads of the block; returns how many of them gave a `predicate`.
int block_barrier(const char* name, bool predicate);

// What the lanes of a warp bring to a collective, null for lanes that take no part.
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
// own; whether that has been done for the copy to `address`, if there was one.
void publish_copies();
bool is_published(const void* address);

// griddepcontrol.wait: every thread of a kernel that may start before the previous one has ended
// must have called it, or what follows could start before that one has ended too.
void wait_for_previous_kernel();
void check_that_previous_kernel_was_awaited();

// Counts blocks over all launches: what a thread remembers must not outlive its block.
extern uint64_t block_number;

// sum += left right, of a warp's matrix instruction.
void multiply_16x8x16(float (&sum)[16][8], const float (&left)[16][16],
                      const float (&right)[16][8]);

}  // namespace cuda_shim

// What the files of the runtime tell each other; kernels see fibres.h alone.
#pragma once

#include <cstddef>
#include <string>

#include "cuda_runtime.h"

namespace cuda_shim {

inline constexpr int kMaxThreads = 1024;

// fibres.cpp: the running thread's number in its block.
int current_thread();

// shared_memory.cpp: what a launch uses; fresh memory for a block of it; what a block has written
// behind its dynamic shared memory, empty if nothing.
void use_shared_memory(const void* kernel, size_t bytes);
void fill_shared_memory();
std::string shared_memory_overrun();

// tensors.cpp: tensors can be touched between these two, and not by the host's code.
void unlock_tensors();
void lock_tensors();

// device.cpp: fails where the device refuses a launch.
void check_launch(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes);

}  // namespace cuda_shim

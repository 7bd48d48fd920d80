// What the files of the runtime tell each other; kernels see fibres.h alone.
#pragma once

#include <cstddef>
#include <string>

#include "cuda_runtime.h"

namespace cuda_shim {

inline constexpr int kMaxThreads = 1024;

// fibres.cpp: the running thread's number in its block; whether bytes are its local variables'.
int current_thread();
bool is_local(const void* address);

// shared_memory.cpp: what a launch uses; fresh memory for a block of it; what a block has written
// behind its dynamic shared memory, empty if nothing.
void use_shared_memory(const void* kernel, size_t bytes);
void fill_shared_memory();
std::string shared_memory_overrun();

// symbols.cpp: what a kernel declares with __shared__.
size_t static_shared_bytes(const void* kernel);

// tensors.cpp: tensors can be touched between these two, and not by the host's code; whether an
// address is in one, or at its end.
void unlock_tensors();
void lock_tensors();
bool is_in_tensor(const void* address);

// device.cpp: fails where the device refuses a launch.
void check_launch(const void* kernel, const cudaLaunchConfig_t& config, size_t parameter_bytes);

}  // namespace cuda_shim

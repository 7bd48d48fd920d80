// The functions that the files of the runtime share; kernels see fibres.h alone.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_shim {

// fibres.cpp: whether an address is in the running thread's local variables.
bool is_local(const void* address);

// shared_memory.cpp: sets the memory that a launch uses; gives a block of the launch fresh memory;
// describes what a block has written behind its dynamic shared memory, empty if nothing.
void use_shared_memory(const void* kernel, size_t bytes);
void fill_shared_memory(int rank);
std::string shared_memory_overrun(int rank);

// fibres.cpp: puts the running thread to sleep among `sleepers`; wakes all of them.
void wait_until_woken(const char* name, std::vector<int>& sleepers);
void wake(std::vector<int>& sleepers);

// clusters.cpp: makes the pending copies, if there are any; forgets barriers as a cluster begins.
bool deliver_copies();
void forget_barriers();

// symbols.cpp: bytes that a kernel declares with __shared__.
size_t static_shared_bytes(const void* kernel);

// tensors.cpp: allow access to tensors between the two calls, but not by the host's code; and
// whether an address is in a tensor, or at its end.
void unlock_tensors();
void lock_tensors();
bool is_in_tensor(const void* address);

// device.cpp: fails where the device refuses a launch.
void check_launch(const void* kernel, const cudaLaunchConfig_t& config, size_t parameter_bytes);

}  // namespace cuda_shim

// What the files of the runtime tell each other; kernels see fibres.h alone.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_shim {

// fibres.cpp: whether bytes are the running thread's local variables.
bool is_local(const void* address);

// shared_memory.cpp: what a launch uses; fresh memory for a block of it; what a block has written
// behind its dynamic shared memory, empty if nothing.
void use_shared_memory(const void* kernel, size_t bytes);
void fill_shared_memory(int rank);
std::string shared_memory_overrun(int rank);

// fibres.cpp: lets the running thread sleep among others; lets them go on.
void wait_until_woken(const char* name, std::vector<int>& sleepers);
void wake(std::vector<int>& sleepers);

// clusters.cpp: makes the copies that are under way, if there are any; a cluster begins.
bool deliver_copies();
void forget_barriers();

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

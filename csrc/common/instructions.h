// The vector instructions that this process uses.
#pragma once

#include <cstdlib>
#include <cstring>

namespace geffect_fast {

enum class Instructions { kBaseline, kAvx2, kAvx512 };

// The best instructions that the processor has. ATEN_CPU_CAPABILITY=default or avx2 allows less, as
// in torch.
inline Instructions instructions() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const auto wished = [&](const char* name) {
    return wish != nullptr && std::strcmp(wish, name) == 0;
  };
  if (wished("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Instructions::kBaseline;
  }
  return wished("avx2") || !__builtin_cpu_supports("avx512f") ? Instructions::kAvx2
                                                              : Instructions::kAvx512;
#else
  return Instructions::kBaseline;
#endif
}

}  // namespace geffect_fast

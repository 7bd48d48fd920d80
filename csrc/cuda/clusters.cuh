// Launching kernels whose blocks share their shared memory (clusters), on sm_90 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/device.cuh"

namespace geffect_fast {

// A kernel, and blocks of it that share their shared memory.
struct Clusters {
  const void* kernel;
  int threads, blocks;  // of a block, of a cluster
  size_t shared_bytes;

  // Clusters that the device runs at once.
  int64_t resident(const Device& device) const {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, size_t>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    int& found = known[{device.index(), kernel, blocks, shared_bytes}];
    if (found == 0) {
      set_shared_memory_limit(kernel, shared_bytes);
      cudaLaunchAttribute attribute;
      cudaLaunchConfig_t config = configuration(device, blocks, &attribute);
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found, kernel, &config));
      STD_TORCH_CHECK(found > 0, "clusters of ", blocks, " blocks do not fit this device");
    }
    return found;
  }

  // Launches n clusters. The kernel may begin before the one before it on the stream has ended, see
  // wait_for_previous_kernel.
  template <class... Params, class... Args>
  void launch(const Device& device, int64_t n, void (*typed)(Params...), Args&&... args) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = configuration(device, n * blocks, attributes);
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
    set_shared_memory_limit(kernel, shared_bytes);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, typed, std::forward<Args>(args)...));
  }

 private:
  cudaLaunchConfig_t configuration(const Device& device, int64_t grid,
                                   cudaLaunchAttribute* cluster) const {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = device.stream();
    config.attrs = cluster;
    config.numAttrs = 1;
    return config;
  }
};

}  // namespace geffect_fast

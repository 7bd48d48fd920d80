// Emulation of csrc/cuda/warpgroup.cuh, which this file replaces by the order of include folders.
//
// A product is made when its thread waits for it, from the content of shared memory at this time.
// Until then its accumulators hold NaN: data that is overwritten, read or waited for at the wrong
// time shows.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "cuda/intrinsics.cuh"

namespace geffect_fast {

// describe_tile checks every tile.
__device__ inline void check_tile_memory(const void*) {}

// The address bits and offsets of the descriptor that the instruction reads.
template <bool kTransposed>
__device__ inline uint64_t describe_tile(const void* tile, int panel_bytes) {
  const auto address =
      static_cast<uint64_t>(static_cast<const unsigned char*>(tile) - dynamic_shared());
  if (address % 1024 != 0) cuda_shim::fail("a tile of wgmma that does not begin on 1024 bytes");
  const uint64_t leading = kTransposed ? panel_bytes / 16 : 1;
  return uint64_t{1} << 62 | uint64_t{64} << 32 | leading << 16 | (address & 0x3ffff) >> 4;
}

namespace warpgroup_emulation {

using Rows = float (*)[4];

// Accumulators of products in flight: their place and their values.
struct Accumulators {
  Rows place;
  std::vector<std::array<float, 4>> value;
  int in_flight = 0;

  size_t bytes() const { return value.size() * sizeof value[0]; }
};

struct Product {
  std::shared_ptr<Accumulators> sum;
  uint64_t x, y;
  void (*run)(const Product&, const cuda_shim::Lanes&);
};

struct Thread {
  uint64_t block = cuda_shim::block_number;
  bool begun = false;
  std::vector<std::vector<Product>> groups{1};  // the last one is not committed yet
};

inline Thread& thread() {
  static Thread threads[cuda_shim::kMaxThreads * cuda_shim::kMaxBlocks];
  Thread& own = threads[cuda_shim::current_thread()];
  if (own.block != cuda_shim::block_number) own = {};
  return own;
}

// The accumulators at `place`, hidden from the kernel while products are in flight.
inline std::shared_ptr<Accumulators> hide(Rows place, int n) {
  for (const auto& group : thread().groups) {
    for (const Product& product : group) {
      if (product.sum->place == place) return product.sum;
    }
  }
  auto hidden = std::make_shared<Accumulators>();
  hidden->place = place;
  hidden->value.resize(n);
  std::memcpy(hidden->value.data(), place, hidden->bytes());
  std::memset(static_cast<void*>(place), 0xff, hidden->bytes());
  return hidden;
}

// Element (i, k) of a described tile: i along the tile, k contracted. Offsets as the PTX ISA gives
// them for the 128-byte swizzle, which permutes bits 4 to 6 of the address by bits 7 to 9.
template <class T, bool kTransposed>
float element(uint64_t tile, int i, int k) {
  const auto field = [&](int from) { return static_cast<uint32_t>(tile >> from & 0x3fff) * 16; };
  const uint32_t leading = field(16), stride = field(32);
  uint32_t address = field(0);
  if constexpr (kTransposed) {
    address += i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128;
  } else {
    address += i / 8 * stride + i % 8 * 128 + k * 2;
  }
  address ^= (address >> 7 & 7) << 4;
  const unsigned char* where = dynamic_shared() + address;
  if (!cuda_shim::is_shared(where, 2)) cuda_shim::fail("wgmma reads outside of shared memory");
  if (!cuda_shim::is_published(where)) {
    cuda_shim::fail("wgmma reads a copy before the fence of the thread that made it");
  }
  uint16_t bits;
  std::memcpy(&bits, where, 2);
  return element_value<T>(bits);
}

template <class T, bool kTransposed>
void run(const Product& product, const cuda_shim::Lanes& lanes) {
  for (int lane = 1; lane < cuda_shim::kLanes; ++lane) {
    const auto& other = lanes.of<Product>(lane);
    if (other.x != product.x || other.y != product.y) {
      cuda_shim::fail("lanes give different tiles to a wgmma");
    }
  }
  const int first = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  float left[16][16];
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) left[i][k] = element<T, kTransposed>(product.x, first + i, k);
  }
  for (int j = 0; j < static_cast<int>(product.sum->value.size()); ++j) {
    float right[16][8], sum[16][8];
    for (int k = 0; k < 16; ++k) {
      for (int c = 0; c < 8; ++c) {
        right[k][c] = element<T, kTransposed>(product.y, 8 * j + c, k);
      }
    }
    const auto each = [&](auto&& visit) {
      for (int lane = 0; lane < cuda_shim::kLanes; ++lane) {
        float* own = lanes.of<Product>(lane).sum->value[j].data();
        for (int e = 0; e < 4; ++e) visit(own[e], sum[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
      }
    };
    each([](float& own, float& place) { place = own; });
    cuda_shim::multiply_16x8x16(sum, left, right);
    each([](float& own, float& place) { own = place; });
  }
}

}  // namespace warpgroup_emulation

__device__ inline void publish_to_warpgroups() { cuda_shim::publish_copies(); }
__device__ inline void warpgroup_begin() { warpgroup_emulation::thread().begun = true; }
__device__ inline void warpgroup_commit() {
  warpgroup_emulation::thread().groups.emplace_back();
  warpgroup_emulation::thread().begun = false;
}

template <int N>
__device__ inline void warpgroup_wait() {
  auto& groups = warpgroup_emulation::thread().groups;
  while (groups.size() > N + 1) {
    for (auto& product : groups.front()) {
      cuda_shim::warp_collective("wgmma", cuda_shim::kAllLanes, &product,
                                 [](const cuda_shim::Lanes& lanes) {
                                   const auto& own = lanes.of<warpgroup_emulation::Product>(0);
                                   own.run(own, lanes);
                                 });
      if (--product.sum->in_flight > 0) continue;
      std::memcpy(product.sum->place, product.sum->value.data(), product.sum->bytes());
    }
    groups.erase(groups.begin());
  }
}

template <class T, bool kTransposed, int kColTiles>
__device__ inline void warpgroup_multiply_add(float (&d)[kColTiles][4], uint64_t x, uint64_t y) {
  cuda_shim::check_capability("wgmma", 90, 90);
  auto& own = warpgroup_emulation::thread();
  if (!own.begun) cuda_shim::fail("wgmma without warpgroup_begin");
  const auto sum = warpgroup_emulation::hide(d, kColTiles);
  ++sum->in_flight;
  own.groups.back().push_back({sum, x, y, warpgroup_emulation::run<T, kTransposed>});
}

}  // namespace geffect_fast

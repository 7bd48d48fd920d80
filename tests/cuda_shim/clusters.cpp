// Barriers in shared memory and the copies that arrive at them.
#include <cstring>
#include <deque>
#include <map>

#include "runtime.h"

namespace cuda_shim {
namespace {

struct BarrierState {
  int arrivals = 0;   // of a phase
  int left = 0;       // arrivals that are still missing in this phase
  int64_t bytes = 0;  // bytes of copies that are still missing
  int64_t phase = 0;
  std::vector<int> sleepers;
};
std::map<const uint64_t*, BarrierState> barriers;

struct LateCopy {
  int bytes;
  uint64_t* barrier;
  std::function<void()> copy;
};
std::deque<LateCopy> under_way;

// The value in a barrier's memory, which shows whether the barrier was overwritten.
constexpr uint64_t kMark = 0x6d62617272696572;

BarrierState& state_of(uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  if (*barrier != kMark) fail("a barrier in shared memory was overwritten");
  return found->second;
}

void end_phase_if_complete(BarrierState& state) {
  if (state.left > 0 || state.bytes != 0) return;
  ++state.phase;
  state.left = state.arrivals;
  wake(state.sleepers);
}

}  // namespace

void forget_barriers() {
  barriers.clear();
  under_way.clear();
}

void barrier_init(uint64_t* barrier, int arrivals) {
  if (!is_shared(barrier, sizeof *barrier)) fail("a barrier outside of shared memory");
  if (arrivals < 1) fail("a barrier for no arrivals");
  *barrier = kMark;
  barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  BarrierState& state = state_of(barrier);
  if (state.left == 0) fail("more arrivals at a barrier than it was initialised for");
  state.bytes += expected_bytes;
  --state.left;
  end_phase_if_complete(state);
}

void barrier_wait(uint64_t* barrier, int parity) {
  // Parity alone tells phases apart: the phase before the first counts as complete.
  while (state_of(barrier).phase % 2 == parity) {
    wait_until_woken("mbarrier.try_wait", state_of(barrier).sleepers);
  }
}

void copy_later(void* to, int bytes, uint64_t* barrier, std::function<void()> copy) {
  state_of(barrier);
  std::memset(to, 0xff, bytes);
  under_way.push_back({bytes, barrier, std::move(copy)});
}

bool deliver_copies() {
  if (under_way.empty()) return false;
  for (; !under_way.empty(); under_way.pop_front()) {
    const LateCopy& late = under_way.front();
    late.copy();
    BarrierState& state = state_of(late.barrier);
    state.bytes -= late.bytes;
    end_phase_if_complete(state);
  }
  return true;
}

}  // namespace cuda_shim

// Whether a weight lies in a cache or in memory, and which way to read it is faster then: no machine says either.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>

#include "stream.h"

namespace liaoyuan {

// Notes that a weight is read now; returns whether so many others were read since it was last that no cache has kept
// it. What is not known yet, or was forgotten for another, is near.
inline bool is_far(const void* weight, int64_t bytes) {
  constexpr int64_t KEPT = 3 * LAST_CACHE;  // a cache that many share keeps some of more than its size
  constexpr uint64_t PLACES = 4096;
  struct Place {
    std::atomic<const void*> weight;
    std::atomic<int64_t> read;  // of all weights, before it
  };
  static Place places[PLACES];
  static std::atomic<int64_t> read;
  int64_t before = read.fetch_add(bytes, std::memory_order_relaxed);
  Place& place = places[reinterpret_cast<uintptr_t>(weight) / 64 * 0x9E3779B97F4A7C15u >> 52];
  bool is_known = place.weight.exchange(weight, std::memory_order_relaxed) == weight;
  return before - place.read.exchange(before, std::memory_order_relaxed) > KEPT && is_known;
}

// Two ways to do the same work, of which the one that took less time of late is chosen. Chance says which is tried, so
// that neither has always the same place in a step; at first each as often, and then the slower one now and then.
class Trial {
  static constexpr int KEPT = 15;  // times that are remembered of each way
  static constexpr uint64_t SELDOM = 128;
  float costs[2][KEPT] = {};  // nanoseconds a byte
  uint32_t counts[2] = {};
  uint64_t chance = 0;

 public:
  bool choose() {
    chance = chance * 6364136223846793005u + 1442695040888963407u;
    bool either = chance >> 63;
    if (std::min(counts[0], counts[1]) < KEPT) return counts[either] < KEPT ? either : !either;
    return (chance >> 40) % SELDOM ? cost(true) < cost(false) : either;
  }
  template <class Work>
  void time(bool way, int64_t bytes, const Work& work) {
    auto start = std::chrono::steady_clock::now();
    work();
    std::chrono::duration<float, std::nano> took = std::chrono::steady_clock::now() - start;
    costs[way][counts[way]++ % KEPT] = took.count() / float(bytes);
  }

 private:
  float cost(bool way) const {  // the median: a machine that others share stops now and then
    float sorted[KEPT];
    std::copy_n(costs[way], KEPT, sorted);
    std::nth_element(sorted, sorted + KEPT / 2, sorted + KEPT);
    return sorted[KEPT / 2];
  }
};

// Brings memory near by reading it in its own order.
inline void read_lines(const void* from, int64_t bytes) {
  auto* line = static_cast<const volatile char*>(from);
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += 64) static_cast<void>(line[at]);
}

}  // namespace liaoyuan

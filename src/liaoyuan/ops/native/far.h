// Whether a weight lies in a cache or in memory: where it is read best depends on it, and no machine says so.
#pragma once
#include <atomic>

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

// Brings memory near by reading it in its own order.
inline void read_lines(const void* from, int64_t bytes) {
  auto* line = static_cast<const volatile char*>(from);
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += 64) static_cast<void>(line[at]);
}

}  // namespace liaoyuan

// Which keys a query sees: one range of them. The causal rule and the sliding window give it, or a list does.
#pragma once
#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace liaoyuan {

constexpr int64_t KEY_CHUNK = 512;  // keys between two rescalings of the output
constexpr float LOWEST = -3.0e38f, HIDDEN = -INFINITY;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;  // inside, scores are logarithms to base 2

struct Range {
  int64_t first, last;  // keys first ... last - 1
};

struct Ranges {
  const int64_t *first = nullptr, *last = nullptr;  // one entry for each query; null: query n is at position + n
  int64_t position = 0, window = 0;                 // and sees so many keys, its own included
  Range of(int64_t query) const {
    if (first) return first[query] < last[query] ? Range{first[query], last[query]} : Range{0, 0};
    int64_t end = position + query + 1;
    return {std::max<int64_t>(0, end - window), end};
  }
};

// The smallest range that holds those of queries begin ... end - 1; [0, 0) if they see nothing.
inline Range hull(const Ranges& ranges, int64_t begin, int64_t end) {
  Range all{INT64_MAX, 0};
  for (int64_t query = begin; query < end; ++query) {
    Range seen = ranges.of(query);
    if (seen.first < seen.last) all = {std::min(all.first, seen.first), std::max(all.last, seen.last)};
  }
  return all.last ? all : Range{0, 0};
}

// What a block of 32 rows sees. The rows of a query, its heads, see the same.
struct BlockRanges {
  alignas(64) int32_t first[BLOCK], limit[BLOCK];  // keys first ... limit, both included
  Range any, every;                                // keys that some row sees, and that all do

  BlockRanges() = default;
  BlockRanges(const Ranges& ranges, int64_t groups, int64_t row, int64_t count) {
    any = hull(ranges, row / groups, (row + count - 1) / groups + 1);
    every = {0, INT64_MAX};
    for (int i = 0; i < BLOCK; ++i) {
      Range seen = ranges.of((row + std::min<int64_t>(i, count - 1)) / groups);
      first[i] = int32_t(seen.first), limit[i] = int32_t(seen.last - 1);
      every = {std::max(every.first, seen.first), std::min(every.last, seen.last)};
    }
  }
  bool hides(int64_t key) const { return key < every.first || key + BLOCK > every.last; }  // of a block of keys, any
};

// Sets the lanes of rows that do not see `key`.
inline IntVec unseen(int32_t key, IntVec first, IntVec limit) { return (key < first) | (key > limit); }

// The end of a softmax over keys with maximum `top` and sum `sums`, and a sink (-inf: none) that has no value: the
// denominator is total * 2^highest. Returns the factor of the output.
inline Vec finish(Vec top, Vec sums, Vec sink, Vec& total, Vec& highest) {
  highest = maximum(top, sink * LOG2_E);
  Vec share = power_of_two(top - highest);
  total = sums * share + power_of_two(sink * LOG2_E - highest);
  return choose(total > Vec{}, share / total, Vec{});
}

}  // namespace liaoyuan

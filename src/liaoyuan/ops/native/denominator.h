// The denominator of a row's softmax, with the same bits whoever reads the row: the loss head, which has some columns
// at a time, and sampling, which has them all. Blocks of 1024 columns are summed in one order, against the highest
// score up to the end of the block; what was summed before is scaled when a block has a higher one.
#pragma once
#include "kernels.h"
#include "stream.h"

namespace liaoyuan {

constexpr int64_t CHUNK = 64, BLOCK = LANES * CHUNK;  // a block has as many chunks as a vector has lanes
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Sixteen of a row's scores, nothing past its end.
template <class T>
Vec scores_at(const T* scores, int64_t i, int64_t count) {
  if (i + LANES <= count) return load(scores + i);
  if (i >= count) return splat(NOTHING);
  return choose(lane_numbers() < int32_t(count - i), load(scores + i, count - i), splat(NOTHING));
}

// body(block, load) for each block of a row, with a function that loads 32 scores of the block, in whatever order; only
// in the last block it must look for the end.
template <class T, class Body>
void over_blocks(const T* scores, int64_t count, const Body& body) {
  int64_t block = 0;
  for (; (block + 1) * BLOCK <= count; ++block)
    body(block, [from = scores + block * BLOCK](int64_t i) { return load_two(from + i); });
  if (block * BLOCK < count)
    body(block, [=, first = block * BLOCK](int64_t i) {
      return Two{scores_at(scores, first + i, count), scores_at(scores, first + i + LANES, count)};
    });
}

// exp of what is zero or less.
inline Vec power(Vec x) { return power_of_two(x * 1.44269504f); }

template <class Score>
float highest_of_block(const Score& score) {
  Vec first = splat(NOTHING), second = first;
  for (int64_t i = 0; i < BLOCK; i += TWO) {
    Two some = score(i);
    first = maximum(some.first, first);
    second = maximum(some.second, second);
  }
  return highest(maximum(first, second));
}

// The sum of exp(score - top) over a block. each(below, powers) is told of every 32 scores, chunk(number, sums) of the
// sums of every chunk, in lanes.
template <class Score, class Each, class Chunk>
float sum_of_block(const Score& score, float top, const Each& each, const Chunk& chunk) {
  Vec total{}, shift = splat(top);
  for (int64_t c = 0; c < LANES; ++c) {
    Vec part{};
    for (int64_t i = 0; i < CHUNK; i += TWO) {
      Two below = score(c * CHUNK + i) - Two{shift, shift}, powers{power(below.first), power(below.second)};
      part += powers.first;
      part += powers.second;
      each(below, powers);
    }
    chunk(c, part);
    total += part;
  }
  return sum(total);
}

}  // namespace liaoyuan

// Operands of products as micro-kernels take them (engines.h): packed into words, for any of the storage orders.
#pragma once
#include "engines.h"

namespace liaoyuan {

template <class T>
struct Source {  // `count` items of `depth` elements; along: an item's elements follow each other
  const T* matrix;
  int64_t stride, count, depth;
  bool along;
};

// Items first ... first + width - 1, a multiple of 16, their words step ... step + steps - 1, as a block [steps, width]
// with `to_stride` words from row to row; zeros past the ends. Of a matrix stored across the depth.
template <class E, class T>
void words_across(const Source<T>& s, int64_t first, int64_t width, int64_t step, int64_t steps, typename E::Word* to,
                  int64_t to_stride) {
  constexpr int64_t AHEAD = 16;  // rows
  for (int64_t i = 0; i < steps; ++i) {
    int64_t at = (step + i) * E::VALUES;
    const T* row = s.matrix + at * s.stride + first;
    int64_t n = 0;
    if (at + 1 < s.depth)
      for (; n + E::SIDE <= std::min(width, s.count - first); n += E::SIDE) {
        __builtin_prefetch(row + AHEAD * s.stride + n, 0, 2);
        E::side_by_side(row + n, row + s.stride + n, to + i * to_stride + n);
      }
    for (; n < width; n += LANES) {
      int64_t items = std::min<int64_t>(s.count - first - n, LANES);
      __builtin_prefetch(row + AHEAD * s.stride + n, 0, 2);
      Vec words{};
      if (items > 0 && at < s.depth) words = E::across(row + n, at + 1 < s.depth ? row + s.stride + n : nullptr, items);
      write(to + i * to_stride + n, words);
    }
  }
}

// The same of a matrix stored along the depth; 16 items, up to 16 steps.
template <class E, class T>
void turned_words(const Source<T>& s, int64_t first, int64_t step, int64_t steps, typename E::Word* to,
                  int64_t to_stride) {
  constexpr int64_t AHEAD = 256;  // bytes
  int64_t at = step * E::VALUES, values = s.depth - at, items = std::clamp<int64_t>(s.count - first, 0, LANES);
  const T* from = s.matrix + first * s.stride + at;
  for (int64_t i = 0; i < items; ++i)  // more rows than the hardware follows
    __builtin_prefetch(reinterpret_cast<const char*>(from + i * s.stride) + AHEAD, 0, 2);
  if (E::IN_PLACE && items == LANES && values >= LANES * E::VALUES && steps == LANES)
    return transpose(from, s.stride * int64_t(sizeof(T)), to, to_stride * 4);
  alignas(64) float rows[LANES * LANES] = {}, block[LANES * LANES];
  for (int64_t i = 0; i < items && values > 0; ++i) store(rows + i * LANES, E::along(from + i * s.stride, values));
  transpose(rows, LANES * 4, block);
  for (int64_t i = 0; i < steps; ++i) std::memcpy(to + i * to_stride, block + i * LANES, LANES * 4);
}

template <class E, class T>
void words_along(const Source<T>& s, int64_t first, int64_t width, int64_t step, int64_t steps, typename E::Word* to) {
  for (int64_t n = 0; n < width; n += LANES)
    for (int64_t i = 0; i < steps; i += LANES)
      turned_words<E>(s, first + n, step + i, std::min<int64_t>(LANES, steps - i), to + i * width + n, width);
}

// `pack_items` of a matrix whose items' elements follow each other. A cut is a short piece of each item, so the machine
// does not guess that the next item's is wanted.
template <class E, class T>
void copy_items(const Source<T>& s, int64_t first, int64_t count, int64_t step, int64_t words, typename E::Word* to,
                int64_t stride) {
  constexpr int64_t AHEAD = 8;  // items
  int64_t at = step * E::VALUES, values = std::max<int64_t>(0, s.depth - at);
  for (int64_t i = 0; i < count; ++i, to += stride) {
    const T* from = s.matrix + (first + i) * s.stride + at;
    int64_t have = first + i < s.count ? values : 0, k = 0;
    for (; k < words && (k + LANES) * E::VALUES <= have; k += LANES) {
      __builtin_prefetch(from + k * E::VALUES + AHEAD * s.stride);
      write(to + k, E::along(from + k * E::VALUES, LANES * E::VALUES));
    }
    for (; k < words; k += LANES)
      write(to + k, k * E::VALUES < have ? E::along(from + k * E::VALUES, have - k * E::VALUES) : Vec{});
  }
}

// Items first ... first + count - 1 as rows of words step ... step + words - 1, a multiple of 16.
template <class E, class T>
void pack_items(const Source<T>& s, int64_t first, int64_t count, int64_t step, int64_t words, typename E::Word* to,
                int64_t stride) {
  if (s.along) return copy_items<E>(s, first, count, step, words, to, stride);
  for (int64_t i = 0; i < count; i += LANES)
    for (int64_t k = 0; k < words; k += LANES) {
      alignas(64) typename E::Word block[LANES * LANES];
      words_across<E>(s, first + i, LANES, step + k, LANES, block, LANES);
      transpose(block, LANES * 4, to + i * stride + k, stride * 4);
    }
}

}  // namespace liaoyuan

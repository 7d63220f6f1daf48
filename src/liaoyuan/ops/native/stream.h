// Rows of memory at the speed of memory: element-wise work takes 32 elements at a time, and a step reads as many of
// bf16 with one load.
#pragma once
#include <algorithm>

#include "rounding.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace liaoyuan {

constexpr int64_t TWO = 2 * LANES;

// 32 elements. Of bf16 the even ones come first, since so a word parts in two by one operation each: good for work
// element by element, and for sums whose order is of no importance.
struct Two {
  Vec first, second;
  friend inline Two operator+(const Two& a, const Two& b) { return {a.first + b.first, a.second + b.second}; }
  friend inline Two operator-(const Two& a, const Two& b) { return {a.first - b.first, a.second - b.second}; }
  friend inline Two operator*(const Two& a, const Two& b) { return {a.first * b.first, a.second * b.second}; }
  friend inline Two operator*(const Two& a, Vec b) { return {a.first * b, a.second * b}; }
  Two& operator+=(const Two& other) { return *this = *this + other; }
};

struct Whole {};  // a count of 32, known when compiled

inline Two load_two(const float* from, Whole = {}) { return {load(from), load(from + LANES)}; }
inline Two load_two(const BFloat16* from, Whole = {}) {
  WordVec words;
  read(from, words);
  return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
}

inline void store_two(float* to, const Two& value, Whole = {}) {
  store(to, value.first);
  store(to + LANES, value.second);
}
inline WordVec narrowed_pairs(const Two& value) { return rounded_pairs(value.first, value.second); }
inline void store_two(BFloat16* to, const Two& value, Whole = {}) { write(to, narrowed_pairs(value)); }

// Fewer than 32, in their order; the others are zero, and are not written.
template <class T>
inline Two load_two(const T* from, int64_t count) {
  return {load(from, count), count > LANES ? load(from + LANES, count - LANES) : Vec{}};
}
template <class T>
inline void store_two(T* to, const Two& value, int64_t count) {
  store(to, value.first, count);
  if (count > LANES) store(to + LANES, value.second, count - LANES);
}

// body(place, count) for every 32 elements of a row, the last ones with a count that is known when it runs.
template <class Full = Whole, class Body>
inline void over_row(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + TWO <= width; i += TWO) body(i, Full{});
  if (i < width) body(i, width - i);
}

// Ask for 32 elements before they are read, or written: where a row is read twice, or outputs follow inputs, the
// machine's own guesses come too late. An address past the end does no harm. Inlined, since a function that only asks
// would be optimised away.
constexpr int64_t AHEAD = 8192;  // bytes
template <class T>
[[gnu::always_inline]] inline void ask(const T* from) {
  for (int64_t at = 0; at < TWO; at += 64 / sizeof(T)) __builtin_prefetch(from + at);
}
template <class T>
[[gnu::always_inline]] inline void ask_to_write(T* to) {
  for (int64_t at = 0; at < TWO; at += 64 / sizeof(T)) __builtin_prefetch(to + at, 1);
}

// Whether so many bytes that are written would drive all else out of the last cache, and themselves too: they are
// better written past it, as a cache reads a line before it writes to it. Fewer are best left for who reads them next.
constexpr int64_t LAST_CACHE = int64_t(1) << 25;  // what cores share; a virtual machine is told other sizes
inline bool is_beyond_caches(int64_t bytes) { return bytes > LAST_CACHE; }
// 64 bytes past the caches, to a multiple of 64; `settle` at last, or another thread may read what was there before.
inline void write_past(void* to, WordVec value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#elif defined(__SSE2__)
  __m128i parts[4];
  write(parts, value);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, parts[i]);
#else
  write(to, value);
#endif
}
inline void settle() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}
inline bool is_aligned(const void* at, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(at) | uint64_t(bytes)) % 64 == 0;
}

struct Past {};  // as Whole, and stored past the caches
inline Two load_two(const float* from, Past) { return load_two(from); }
inline Two load_two(const BFloat16* from, Past) { return load_two(from); }
inline void store_two(float* to, const Two& value, Past) {
  write_past(to, (WordVec)value.first);
  write_past(to + LANES, (WordVec)value.second);
}
inline void store_two(BFloat16* to, const Two& value, Past) { write_past(to, narrowed_pairs(value)); }

// One bit for each lane that is set.
inline uint32_t bits_of(IntVec mask) {
#ifdef __AVX512DQ__
  return _mm512_movepi32_mask((__m512i)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= uint32_t(mask[i] < 0) << i;
  return bits;
#endif
}

inline float sum(const Two& value) { return sum(value.first + value.second); }

}  // namespace liaoyuan

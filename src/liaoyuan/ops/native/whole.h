// Sixteen lanes in one register of 512 bits, as GCC's vector type; the same functions as halves.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace liaoyuan {

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t WordVec __attribute__((vector_size(64)));
using Register = Vec;  // what one register of the machine holds
inline void hold(Register&) {}
typedef uint16_t ShortVec __attribute__((vector_size(32)));

inline IntVec lane_numbers() { return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

template <class Value>
inline void read(const void* from, Value& value) { std::memcpy(&value, from, sizeof value); }
template <class Value>
inline void write(void* to, const Value& value) { std::memcpy(to, &value, sizeof value); }

inline Vec choose(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

inline WordVec words_of(const uint16_t* from) {
  ShortVec half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, WordVec);
}
inline void to_halves(uint16_t* to, WordVec words) {  // words below 2^16
  ShortVec half = __builtin_convertvector(words, ShortVec);
  std::memcpy(to, &half, sizeof half);
}

// Lanes 0, 2, 4, ... of both as one vector, and lanes 1, 3, 5, ...; zip is the way back.
inline void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
  const IntVec places = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  even = __builtin_shuffle(low, high, places);
  odd = __builtin_shuffle(low, high, places + 1);
}
inline void zip(Vec even, Vec odd, Vec& low, Vec& high) {
  const IntVec places = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  low = __builtin_shuffle(even, odd, places);
  high = __builtin_shuffle(even, odd, places + 8);
}

inline void transpose(const void* from, int64_t from_stride, void* to) {  // 16 x 16 words; stride in bytes
  WordVec row[16];
  for (int i = 0; i < 16; ++i)
    std::memcpy(&row[i], static_cast<const char*>(from) + i * from_stride, sizeof row[i]);
  const WordVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (uint32_t width = 1; width < 16; width *= 2) {
    WordVec upper = (WordVec)((lane & width) != 0);
    WordVec first = (upper & (lane + 16 - width)) | (~upper & lane);
    WordVec second = (upper & (lane + 16)) | (~upper & (lane + width));
#pragma GCC unroll 16
    for (uint32_t i = 0; i < 16; ++i) {
      if (i & width) continue;
      WordVec a = row[i], b = row[i + width];
      row[i] = __builtin_shuffle(a, b, first);
      row[i + width] = __builtin_shuffle(a, b, second);
    }
  }
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint32_t*>(to) + i * 16, &row[i], sizeof row[i]);
}

}  // namespace liaoyuan

// Sixteen lanes in one register of 512 bits, as GCC's vector type; the same functions as halves.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace liaoyuan {

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t WordVec __attribute__((vector_size(64)));
using Register = Vec;  // what one register of the machine holds
using RegisterWords = WordVec;
using RegisterInts = IntVec;
inline void hold(Register&) {}
inline Register fused(Register a, Register b, Register sum) { return (Register)_mm512_fmadd_ps(a, b, sum); }
typedef uint16_t ShortVec __attribute__((vector_size(32)));

inline IntVec lane_numbers() { return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

template <class Value>
inline void read(const void* from, Value& value) { std::memcpy(&value, from, sizeof value); }
template <class Value>
inline void write(void* to, const Value& value) { std::memcpy(to, &value, sizeof value); }

inline Vec choose(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

inline WordVec words_of(const uint16_t* from) {  // GCC 12 takes __builtin_convertvector apart into five instructions
  return (WordVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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

// 16 x 16 words, turned in registers; the stride in bytes.
[[gnu::always_inline]] inline void transpose_words(const void* from, int64_t from_stride, Vec* columns) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; k += 8) {
      b[i + k] = _mm512_shuffle_i32x4(a[i + k], a[i + k + 4], 0x88);
      b[i + k + 4] = _mm512_shuffle_i32x4(a[i + k], a[i + k + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    columns[i] = (Vec)_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    columns[i + 8] = (Vec)_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
}

// The same to memory; strides in bytes.
inline void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride = 64) {
  Vec columns[16];
  transpose_words(from, from_stride, columns);
  for (int i = 0; i < 16; ++i) write(static_cast<char*>(to) + i * to_stride, columns[i]);
}

}  // namespace liaoyuan

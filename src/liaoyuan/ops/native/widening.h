// Weights of 8 or 4 bits as the words that a matrix product multiplies (engines.h): fp32 values, or pairs of bf16, which
// hold every weight exactly. Scales are not part of them. For registers of 16 lanes; narrow.h is for others.
//
// Each word of turned memory is taken apart, lane by lane, into the values that follow each other along the depth.
#pragma once
#include <immintrin.h>

#include <array>
#include <bit>

#include "byte_rows.h"

namespace liaoyuan {

inline Vec integer(WordVec words) { return (Vec)(words | 0x4b000000u); }  // 2^23 + n is n in the lowest bits

// What lies in the lowest byte of each word.
template <Bits B>
inline Vec value_of(WordVec byte) {
  if constexpr (B == Bits::int8) return integer(byte ^ 0x80u) - (8388608.0f + 128.0f);
  return (Vec)(((byte & 0x80u) << 24) | ((byte & 0x7fu) << 20)) * 0x1p120f;  // e4m3: the bias is 7, not 127
}

// The values in a column, words [16]: of its four bytes, or of the two nibbles of a plane, where `zero` stands for 0.
template <class Word>
struct Widening;

template <>
struct Widening<float> {
  static constexpr int VALUES = 1;

  template <Bits B>
  ALWAYS_INLINE static void of_bytes(WordVec column, Vec* values) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) values[i] = value_of<B>((column >> (8 * i)) & 0xffu);
  }
  template <Bits B>
  ALWAYS_INLINE static void of_nibbles(WordVec column, int plane, WordVec zero, Vec* values) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      values[i] = integer((column >> (4 * plane + 16 * i)) & 0xfu) - integer(B == Bits::int4 ? zero | 8u : zero & 0xfu);
  }
};

#ifdef __AVX512BF16__
// bf16 bits of what a byte stands for, but the sign: of 1 ... 128, and of e4m3's 128.
template <Bits B>
constexpr uint16_t bits_of_byte(int byte) {
  float value = B == Bits::int8 ? float(byte + 1)
                : byte < 8      ? float(byte) * 0x1p-9f
                                : float(8 + byte % 8) * float(1 << (byte / 8)) * 0x1p-10f;
  return uint16_t(std::bit_cast<uint32_t>(value) >> 16);
}
template <Bits B>
constexpr std::array<uint8_t, 128> table_of(int shift) {
  std::array<uint8_t, 128> table{};
  for (int i = 0; i < 128; ++i) table[size_t(i)] = uint8_t(bits_of_byte<B>(i) >> shift);
  return table;
}
// bf16 bits of place - zero, where places of 16 and more count as below zero (or, if alike, as places 0 ... 15).
constexpr std::array<uint16_t, 32> integers(int zero, bool alike) {
  std::array<uint16_t, 32> table{};
  for (int i = 0; i < 32; ++i)
    table[size_t(i)] = uint16_t(std::bit_cast<uint32_t>(float((i < 16 || alike ? i % 16 : i - 32) - zero)) >> 16);
  return table;
}

template <>
struct Widening<uint32_t> {
  static constexpr int VALUES = 2;

  template <Bits B>
  ALWAYS_INLINE static void of_bytes(WordVec column, Vec* values) {
#ifdef __AVX512VBMI__
    __m512i bytes = (__m512i)column, low, high;
    if constexpr (B == Bits::int8) {  // a magnitude is 0 ... 128: 0 apart, the rest by its place among 128
      __mmask64 some = _mm512_test_epi8_mask(bytes, bytes);
      __m512i place = _mm512_subs_epu8(_mm512_abs_epi8(bytes), _mm512_set1_epi8(1));
      low = _mm512_maskz_permutex2var_epi8(some, half<B, 0>(0), place, half<B, 0>(64));
      high = _mm512_maskz_permutex2var_epi8(some, half<B, 8>(0), place, half<B, 8>(64));
    } else {  // the look-up takes seven bits
      low = _mm512_permutex2var_epi8(half<B, 0>(0), bytes, half<B, 0>(64));
      high = _mm512_permutex2var_epi8(half<B, 8>(0), bytes, half<B, 8>(64));
    }
    constexpr int OR_AND = 0xf8;  // a | (b & c): the sign
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi32(int(0x80808080)), OR_AND);
    values[0] = (Vec)_mm512_permutex2var_epi8(low, side_by_side(0), high);
    values[1] = (Vec)_mm512_permutex2var_epi8(low, side_by_side(2), high);
#else
    for (int i = 0; i < 2; ++i) {  // exact: the lower halves are zero
      WordVec even = (WordVec)value_of<B>((column >> (16 * i)) & 0xffu);
      WordVec odd = (WordVec)value_of<B>((column >> (16 * i + 8)) & 0xffu);
      values[i] = (Vec)((even >> 16) | odd);
    }
#endif
  }

  template <Bits B>
  ALWAYS_INLINE static void of_nibbles(WordVec column, int plane, WordVec zero, Vec* values) {
    alignas(64) static constexpr std::array<uint16_t, 32> table = integers(B == Bits::int4 ? 8 : 0, B == Bits::int4);
    __m512i place = _mm512_srli_epi16((__m512i)column, unsigned(4 * plane));
    if constexpr (B == Bits::int4_zeros)  // the look-up takes five bits
      place = _mm512_sub_epi16(_mm512_and_si512(place, _mm512_set1_epi16(15)), (__m512i)zero);
    values[0] = (Vec)_mm512_permutexvar_epi16(place, _mm512_load_si512(table.data()));
  }

 private:
#ifdef __AVX512VBMI__
  template <Bits B, int SHIFT>
  static __m512i half(int at) {
    alignas(64) static constexpr std::array<uint8_t, 128> table = table_of<B>(SHIFT);
    return _mm512_load_si512(table.data() + at);
  }
  // In each word: low and high of its byte `first`, then of the next.
  static __m512i side_by_side(int first) {
    alignas(64) static constexpr std::array<std::array<uint8_t, 64>, 2> places = [] {
      std::array<std::array<uint8_t, 64>, 2> found{};
      for (int i = 0; i < 128; ++i)
        found[size_t(i / 64)][size_t(i % 64)] = uint8_t(i % 64 / 4 * 4 + i / 64 * 2 + i % 4 / 2 + i % 2 * 64);
      return found;
    }();
    return _mm512_load_si512(places[size_t(first / 2)].data());
  }
#endif
};
#endif

// body(plane, step in it, word) for what 64 bytes of 16 outputs hold: two planes, or the four of 4 bits. Planes take
// turns, so that their sums do not wait for each other. zero(plane): as above, in both halves of a word.
template <Bits B, class Word, class Zero, class Body>
ALWAYS_INLINE void over_words(const Vec* columns, const Zero& zero, const Body& body) {
  using W = Widening<Word>;
  constexpr int TURNS = is_four(B) ? 4 : 2, EACH = is_four(B) ? 2 : 4, COLUMNS = is_four(B) ? 16 : 8;
#pragma GCC unroll 16
  for (int j = 0; j < COLUMNS; ++j)
#pragma GCC unroll 4
    for (int p = 0; p < TURNS; ++p) {
      Vec values[EACH / W::VALUES];
      if constexpr (is_four(B))
        W::template of_nibbles<B>((WordVec)columns[j], p, zero(p), values);
      else
        W::template of_bytes<B>((WordVec)columns[p * COLUMNS + j], values);
#pragma GCC unroll 4
      for (int i = 0; i < EACH / W::VALUES; ++i) body(p, j * (EACH / W::VALUES) + i, values[i]);
    }
}

}  // namespace liaoyuan

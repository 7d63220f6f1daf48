// Two vectors to bf16 by the machine's own instruction where it has one: the same bits as `store` of vector.h, in a
// third of its instructions.
#pragma once
#include "vector.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace liaoyuan {

#ifdef __AVX512BF16__
// The instruction takes what is nearer to zero than 2^-126 for zero, and `store` does not.
inline bool has_denormal(Vec a, Vec b) {
  constexpr int DENORMAL = 0x20;
  return !_mm512_kortestz(_mm512_fpclass_ps_mask((__m512)a, DENORMAL), _mm512_fpclass_ps_mask((__m512)b, DENORMAL));
}
inline __m512i rounded_halves(Vec a, Vec b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
#endif

// All lanes of a, then all of b.
inline void store_two(BFloat16* to, Vec a, Vec b) {
#ifdef __AVX512BF16__
  if (!__builtin_expect(has_denormal(a, b), 0)) return write(to, rounded_halves(a, b));
#endif
  store(to, a);
  store(to + LANES, b);
}
inline void store_two(float* to, Vec a, Vec b) {
  store(to, a);
  store(to + LANES, b);
}

// Each to a place of its own.
inline void store_apart(BFloat16* to_a, Vec a, BFloat16* to_b, Vec b) {
#ifdef __AVX512BF16__
  if (!__builtin_expect(has_denormal(a, b), 0)) {
    __m512i both = rounded_halves(a, b);
    write(to_a, _mm512_castsi512_si256(both));
    return write(to_b, _mm512_extracti64x4_epi64(both, 1));
  }
#endif
  store(to_a, a);
  store(to_b, b);
}
inline void store_apart(float* to_a, Vec a, float* to_b, Vec b) {
  store(to_a, a);
  store(to_b, b);
}

// Lanes of both in turn: even 0, odd 0, even 1, ...
inline WordVec rounded_pairs(Vec even, Vec odd) {
#ifdef __AVX512BF16__
  if (!__builtin_expect(has_denormal(even, odd), 0)) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (WordVec)_mm512_permutexvar_epi16(places, rounded_halves(even, odd));
  }
#endif
  return (rounded_words(even) >> 16) | (rounded_words(odd) & 0xffff0000u);
}
inline void store_pairs(BFloat16* to, Vec even, Vec odd) { write(to, rounded_pairs(even, odd)); }
inline void store_pairs(float* to, Vec even, Vec odd) {
  Vec low, high;
  zip(even, odd, low, high);
  store_two(to, low, high);
}

}  // namespace liaoyuan

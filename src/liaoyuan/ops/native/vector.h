// Sixteen fp32 lanes on any machine: one AVX-512 register as GCC's vector type, or halves of it (halves.h).
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include "whole.h"
#else
#include "halves.h"
#endif

namespace liaoyuan {

struct BFloat16 {
  uint16_t bits;
};

constexpr int LANES = 16;

inline Vec splat(float value) { return value - Vec{}; }

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  uint32_t word = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

inline Vec load(const float* from) {
  Vec result;
  read(from, result);
  return result;
}
inline Vec load(const BFloat16* from) { return (Vec)(words_of(reinterpret_cast<const uint16_t*>(from)) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline WordVec rounded_words(Vec value) {
  WordVec word = (WordVec)value;
  WordVec even = word + (0x7fffu + ((word >> 16) & 1u));
  IntVec is_nan = value != value;
  return (even & ~(WordVec)is_nan) | ((word | 0x400000u) & (WordVec)is_nan);
}

inline void store(float* to, Vec value) { write(to, value); }
inline void store(BFloat16* to, Vec value) {
  to_halves(reinterpret_cast<uint16_t*>(to), rounded_words(value) >> 16);
}

// The first `count` lanes; the others are zero, and are not written.
template <class T>
inline Vec load(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T full[LANES] = {};
  std::memcpy(full, from, size_t(count) * sizeof(T));
  return load(full);
}
template <class T>
inline void store(T* to, Vec value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T full[LANES];
  store(full, value);
  std::memcpy(to, full, size_t(count) * sizeof(T));
}

template <class T>
inline Vec rounded(Vec value);  // as if it had been stored as T
template <>
inline Vec rounded<float>(Vec value) { return value; }
template <>
inline Vec rounded<BFloat16>(Vec value) { return (Vec)(rounded_words(value) & 0xffff0000u); }

inline Vec maximum(Vec a, Vec b) { return choose(a > b, a, b); }

// Always summed in the same order: lanes 8 apart, then 4, 2 and 1.
inline float sum(Vec v) {
#ifdef __AVX512F__
  const IntVec lane = lane_numbers();
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2) v += __builtin_shuffle(v, lane + width);
  return v[0];
#else
  float lane[LANES];
  store(lane, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}
inline float highest(Vec v) {
  float lane[LANES];
  store(lane, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// exp by 2^n * polynomial (Cephes); relative error below 2e-7; zero below -87.
inline Vec exponential(Vec x) {
  const float round = 12582912.0f;  // adding and taking away 1.5 * 2^23 rounds to an integer
  Vec clamped = choose(x > splat(88.0f), splat(88.0f), x);  // far below, what comes out is garbage, and made zero
  Vec n = clamped * 1.44269504f + round;
  IntVec power = (IntVec)n;
  n = n - round;
  Vec r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Vec result = (Vec)((IntVec)p + (power << 23));
  return (Vec)((IntVec)result & ~(IntVec)(x < splat(-87.0f)));
}

// 2^x for x below 127 (above: garbage) by a polynomial fitted to 2^x in [-1/2, 1/2] that is 1 at 0; relative error
// below 2e-7; zero below -126.
inline Vec power_of_two(Vec x) {
  const float round = 12582912.0f;  // as above
  Vec n = x + round;
  IntVec power = (IntVec)n;
  Vec r = x - (n - round);
  Vec p = r * 1.32647273e-3f + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  Vec result = (Vec)((IntVec)p + (power << 23));
  return (Vec)((IntVec)result & ~(IntVec)(x < splat(-126.0f)));
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace liaoyuan

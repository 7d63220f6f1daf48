// Sixteen lanes where the machine's registers hold fewer: two halves, each a native vector (AVX2) or itself two of
// them (SSE, NEON). GCC takes wide vector types apart too, but comparisons, conversions and shuffles lane by lane.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace liaoyuan {

template <class Half>
struct Halves {
  Half low, high;

  using Lane = std::remove_cvref_t<decltype(low[0])>;
  static constexpr int COUNT = sizeof(Half) / sizeof(Lane);  // of one half

  Lane operator[](int i) const { return i < COUNT ? low[i] : high[i - COUNT]; }

  // The same bits as lanes of another type.
  template <class Other>
  explicit operator Halves<Other>() const { return {(Other)low, (Other)high}; }

#define ELEMENTWISE(OP)                                                                                        \
  friend inline auto operator OP(const Halves& a, const Halves& b) { return join(a.low OP b.low, a.high OP b.high); } \
  friend inline auto operator OP(const Halves& a, Lane b) { return join(a.low OP b, a.high OP b); }             \
  friend inline auto operator OP(Lane a, const Halves& b) { return join(a OP b.low, a OP b.high); }
  ELEMENTWISE(+) ELEMENTWISE(-) ELEMENTWISE(*) ELEMENTWISE(/) ELEMENTWISE(&) ELEMENTWISE(|) ELEMENTWISE(^)
  ELEMENTWISE(<) ELEMENTWISE(>) ELEMENTWISE(!=)
#undef ELEMENTWISE
  friend inline Halves operator<<(const Halves& a, int bits) { return {a.low << bits, a.high << bits}; }
  friend inline Halves operator>>(const Halves& a, int bits) { return {a.low >> bits, a.high >> bits}; }
  Halves operator-() const { return {-low, -high}; }
  Halves operator~() const { return {~low, ~high}; }
  template <class Value>
  Halves& operator+=(const Value& value) { return *this = *this + value; }
  template <class Value>
  Halves& operator*=(const Value& value) { return *this = *this * value; }

  template <class Result>
  static Halves<Result> join(Result low, Result high) { return {low, high}; }
};

// Each register is copied on its own: a copy of the whole would keep the value in memory.
template <class Half>
inline void read(const void* from, Half& value) { std::memcpy(&value, from, sizeof value); }
template <class Half>
inline void read(const void* from, Halves<Half>& value) {
  read(from, value.low);
  read(static_cast<const char*>(from) + sizeof(Half), value.high);
}
template <class Half>
inline void write(void* to, const Half& value) { std::memcpy(to, &value, sizeof value); }
template <class Half>
inline void write(void* to, const Halves<Half>& value) {
  write(to, value.low);
  write(static_cast<char*>(to) + sizeof(Half), value.high);
}

template <class Condition, class Half>
inline Half choose(Condition condition, Half yes, Half no) { return condition ? yes : no; }
template <class Condition, class Half>
inline Halves<Half> choose(const Halves<Condition>& condition, const Halves<Half>& yes, const Halves<Half>& no) {
  return {choose(condition.low, yes.low, no.low), choose(condition.high, yes.high, no.high)};
}

#ifdef __AVX2__
typedef float HalfVec __attribute__((vector_size(32)));
typedef int32_t HalfInt __attribute__((vector_size(32)));
typedef uint32_t HalfWord __attribute__((vector_size(32)));
using Register = HalfVec;  // what one register of the machine holds
using RegisterWords = HalfWord;
using RegisterInts = HalfInt;
typedef int8_t ByteRegister __attribute__((vector_size(32)));
inline void hold(Register& value) { asm("" : "+x"(value)); }  // load it once, not in every use
#ifdef __FMA__
inline Register fused(Register a, Register b, Register sum) { return (Register)_mm256_fmadd_ps(a, b, sum); }
#else
inline Register fused(Register a, Register b, Register sum) { return a * b + sum; }
#endif
#else
typedef float QuarterVec __attribute__((vector_size(16)));
typedef int32_t QuarterInt __attribute__((vector_size(16)));
typedef uint32_t QuarterWord __attribute__((vector_size(16)));
using Register = QuarterVec;
using RegisterWords = QuarterWord;
using RegisterInts = QuarterInt;
typedef int8_t ByteRegister __attribute__((vector_size(16)));
inline void hold(Register&) {}
inline Register fused(Register a, Register b, Register sum) { return a * b + sum; }
using HalfVec = Halves<QuarterVec>;
using HalfInt = Halves<QuarterInt>;
using HalfWord = Halves<QuarterWord>;
#endif
using Vec = Halves<HalfVec>;
using IntVec = Halves<HalfInt>;
using WordVec = Halves<HalfWord>;

inline IntVec lane_numbers() {
  const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IntVec result;
  read(lane, result);
  return result;
}

#ifdef __AVX2__
inline WordVec words_of(const uint16_t* from) {
  auto part = [](const uint16_t* at) {
    return (HalfWord)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  };
  return {part(from), part(from + 8)};
}
inline void to_halves(uint16_t* to, WordVec words) {  // words below 2^16
  __m256i packed = _mm256_packus_epi32((__m256i)words.low, (__m256i)words.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}
// Lanes 0, 2, 4, ... of both as one vector, and lanes 1, 3, 5, ...; zip is the way back.
inline void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
  auto order = [](__m256 mixed) { return (HalfVec)_mm256_permute4x64_pd((__m256d)mixed, 0xd8); };
  even = {order(_mm256_shuffle_ps(low.low, low.high, 0x88)), order(_mm256_shuffle_ps(high.low, high.high, 0x88))};
  odd = {order(_mm256_shuffle_ps(low.low, low.high, 0xdd)), order(_mm256_shuffle_ps(high.low, high.high, 0xdd))};
}
inline void zip(Vec even, Vec odd, Vec& low, Vec& high) {
  auto both = [](__m256 a, __m256 b) {
    __m256 first = _mm256_unpacklo_ps(a, b), second = _mm256_unpackhi_ps(a, b);
    return Vec{_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)};
  };
  low = both(even.low, odd.low);
  high = both(even.high, odd.high);
}

// 8 x 8 words, turned in registers; the stride in bytes.
[[gnu::always_inline]] inline void transpose_words(const void* from, int64_t from_stride, Register* columns) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i)
    row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(from) + i * from_stride));
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      four[i + 2 * k] = _mm256_shuffle_ps(pair[i + k], pair[i + k + 2], 0x44);
      four[i + 2 * k + 1] = _mm256_shuffle_ps(pair[i + k], pair[i + k + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    columns[i] = (Register)_mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
    columns[i + 4] = (Register)_mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
  }
}
// 32 bytes of 8 rows, turned: row k holds bytes 2k and 2k + 1 of all, then 2k + 16 and 2k + 17; the stride in bytes.
[[gnu::always_inline]] inline void transpose_bytes(const uint8_t* from, int64_t from_stride, ByteRegister* rows) {
  __m256i row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
  for (int i = 0; i < 4; ++i) {
    pair[i] = _mm256_unpacklo_epi8(row[2 * i], row[2 * i + 1]);
    pair[i + 4] = _mm256_unpackhi_epi8(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      four[i + k] = _mm256_unpacklo_epi16(pair[i + 2 * k], pair[i + 2 * k + 1]);
      four[i + k + 2] = _mm256_unpackhi_epi16(pair[i + 2 * k], pair[i + 2 * k + 1]);
    }
  for (int i = 0; i < 8; i += 2) {
    rows[i] = (ByteRegister)_mm256_unpacklo_epi32(four[i], four[i + 1]);
    rows[i + 1] = (ByteRegister)_mm256_unpackhi_epi32(four[i], four[i + 1]);
  }
}
[[gnu::always_inline]] inline RegisterInts integers(const int8_t* from) {
  return (RegisterInts)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
inline Register to_floats(RegisterInts values) { return (Register)_mm256_cvtepi32_ps((__m256i)values); }
#else
inline WordVec words_of(const uint16_t* from) {
  uint32_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = from[i];
  WordVec result;
  read(words, result);
  return result;
}
inline void to_halves(uint16_t* to, WordVec words) {
  for (int i = 0; i < 16; ++i) to[i] = uint16_t(words[i]);
}
inline void unzip(Vec low, Vec high, Vec& even, Vec& odd) {
  float all[32], parted[32];
  write(all, low);
  write(all + 16, high);
  for (int i = 0; i < 16; ++i) parted[i] = all[2 * i], parted[16 + i] = all[2 * i + 1];
  read(parted, even);
  read(parted + 16, odd);
}
inline void zip(Vec even, Vec odd, Vec& low, Vec& high) {
  float all[32];
  for (int i = 0; i < 16; ++i) all[2 * i] = even[i], all[2 * i + 1] = odd[i];
  read(all, low);
  read(all + 16, high);
}
// 32 bytes of 4 rows, turned: bytes 2k and 2k + 1 of all, then 2k + 16 and 2k + 17, for every k.
inline void transpose_bytes(const uint8_t* from, int64_t from_stride, ByteRegister* rows) {
  int8_t turned[128];
  for (int at = 0; at < 128; ++at)
    turned[at] = int8_t(from[at % 4 * from_stride + at / 16 * 2 + at / 8 % 2 * 16 + at / 4 % 2]);
  for (int i = 0; i < 8; ++i) read(turned + 16 * i, rows[i]);
}
inline RegisterInts integers(const int8_t* from) { return RegisterInts{from[0], from[1], from[2], from[3]}; }
inline Register to_floats(RegisterInts values) { return __builtin_convertvector(values, Register); }
// 4 x 4 words, turned in registers; the stride in bytes.
[[gnu::always_inline]] inline void transpose_words(const void* from, int64_t from_stride, Register* columns) {
  const QuarterInt low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  QuarterVec row[4];
  for (int k = 0; k < 4; ++k) read(static_cast<const char*>(from) + k * from_stride, row[k]);
  QuarterVec a = __builtin_shuffle(row[0], row[1], low), b = __builtin_shuffle(row[2], row[3], low);
  QuarterVec c = __builtin_shuffle(row[0], row[1], high), d = __builtin_shuffle(row[2], row[3], high);
  columns[0] = __builtin_shuffle(a, b, first), columns[1] = __builtin_shuffle(a, b, second);
  columns[2] = __builtin_shuffle(c, d, first), columns[3] = __builtin_shuffle(c, d, second);
}
#endif

// 16 x 16 words to memory, square by square; strides in bytes.
inline void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride = 64) {
  constexpr int SIDE = sizeof(Register) / 4;
  for (int i = 0; i < 16; i += SIDE)
    for (int j = 0; j < 16; j += SIDE) {
      Register columns[SIDE];
      transpose_words(static_cast<const char*>(from) + i * from_stride + j * 4, from_stride, columns);
      for (int k = 0; k < SIDE; ++k) write(static_cast<char*>(to) + (j + k) * to_stride + i * 4, columns[k]);
    }
}

}  // namespace liaoyuan

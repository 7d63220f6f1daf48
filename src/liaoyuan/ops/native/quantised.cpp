// Linear with weights of 8 or 4 bits: they are widened in registers on their way from memory to the multiplication.
//
// A block is 128 weights of one output, four planes of 32. Two engines, by what they multiply: Wide, fp32 on any
// machine; Halfwords, bf16 pairs where AVX-512 has them (all weights are exact in bf16). Every output is summed lane by
// lane along the depth, group by group: nothing else enters the order, so a row's bits depend on that row alone.
#include <algorithm>

#include "kernels.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace liaoyuan {

namespace {

constexpr int PLANES = 4, PLANE = 32;
constexpr int64_t BLOCK = PLANES * PLANE;
constexpr int64_t OUTPUTS_PER_TASK = 32;
constexpr int OUTPUTS = sizeof(Vec) / sizeof(Register) == 1 ? 4 : 1;  // summed at once, as far as registers reach

constexpr int ROWS = 4;  // of one pass
constexpr int64_t WIDENED = 8;  // blocks of an output that are widened at a time for more rows than that

#define ALWAYS_INLINE inline __attribute__((always_inline))  // sums stay in registers

using Bits = QuantisedBits;

constexpr int64_t block_bytes(Bits bits) { return bits == Bits::int8 || bits == Bits::fp8 ? BLOCK : BLOCK / 2; }

// Ask for the block that is read next but a few outputs: an output is a page or so, where the machine's guess ends.
template <Bits B>
void prefetch_ahead(const uint8_t* block) {
  for (int64_t i = 0; i < block_bytes(B); i += 64) __builtin_prefetch(block + i, 0, 2);
}

struct Wide {
  using Element = float;
  struct Piece {
    Vec first, second;
  };

  // Bytes are widened in pairs, so the even places of a plane come first, then the odd ones.
  static int64_t place(Bits bits, int64_t k) {
    return block_bytes(bits) == BLOCK ? k / PLANE * PLANE + k % 2 * 16 + k % PLANE / 2 : k;
  }
  template <class T>
  static float element(T value) { return widen(value); }

  template <Bits B>
  static Piece widen_plane(const uint8_t* block, int plane, int zero) {
    const uint16_t* words = reinterpret_cast<const uint16_t*>(block);
    if constexpr (block_bytes(B) == BLOCK) {
      WordVec pair = words_of(words + plane * 16);
      if constexpr (B == Bits::int8) return {signed_byte(pair & 0xffu), signed_byte(pair >> 8)};
      return {small_float(pair & 0xffu), small_float(pair >> 8)};
    } else {
      auto nibbles = [&](const uint16_t* at) { return integer((words_of(at) >> (4 * plane)) & 0xfu, float(zero)); };
      return {nibbles(words), nibbles(words + 16)};
    }
  }
  static Piece plane(const float* x) { return {load(x), load(x + 16)}; }
  static Vec multiply(Vec sum, const Piece& weight, const Piece& x) {
    sum += weight.first * x.first;
    return sum + weight.second * x.second;
  }

 private:
  static Vec integer(WordVec words, float zero) {  // 2^23 + n is n in the lowest bits
    return (Vec)(words | 0x4b000000u) - (8388608.0f + zero);
  }
  static Vec signed_byte(WordVec words) { return integer((words + 0x80u) & 0xffu, 128.0f); }
  static Vec small_float(WordVec words) {  // e4m3: the exponent's bias is 7, not 127
    return (Vec)(((words & 0x80u) << 24) | ((words & 0x7fu) << 20)) * 0x1p120f;
  }
};

#ifdef __AVX512BF16__
struct Halfwords {
  using Element = BFloat16;
  using Piece = __m512bh;

  static int64_t place(Bits, int64_t k) { return k; }
  static BFloat16 element(BFloat16 value) { return value; }

  template <Bits B>
  static Piece widen_plane(const uint8_t* block, int plane, int zero) {
    if constexpr (B == Bits::int8) {
      const __m128i* bytes = reinterpret_cast<const __m128i*>(block) + 2 * plane;
      auto widened = [](const __m128i* at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at))); };
      return _mm512_cvtne2ps_pbh(widened(bytes + 1), widened(bytes));
    } else if constexpr (B == Bits::fp8) {  // as fp16 of another exponent, whose subnormals are numbers too
      __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + plane));
      words = _mm512_and_si512(_mm512_slli_epi16(words, 7), _mm512_set1_epi16(int16_t(0xbf80)));
      __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
      return _mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1)), low);
    } else {  // a look-up takes the lowest five bits: the fifth, of the next weight, is made to change nothing
      __m512i lane = _mm512_and_si512(lane_of_halfwords(), _mm512_set1_epi16(15));
      __m512i table = _mm512_permutexvar_epi16(_mm512_sub_epi16(lane, _mm512_set1_epi16(int16_t(zero))), integers());
      return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(block), 4 * plane), table);
    }
  }
  static Piece plane(const BFloat16* x) { return (Piece)_mm512_loadu_si512(x); }
  static Vec multiply(Vec sum, const Piece& weight, const Piece& x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, weight, x);
  }

 private:
  static __m512i lane_of_halfwords() {
    alignas(64) static constexpr int16_t lane[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    return _mm512_load_si512(lane);
  }
  static __m512i integers() {  // 0 ... 15, -16 ... -1 in bf16
    alignas(64) static constexpr uint16_t bits[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130,
        0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    return _mm512_load_si512(bits);
  }
};
template <class E>
constexpr float FP8_UNIT = std::is_same_v<E, Halfwords> ? 256.0f : 1.0f;  // what the scale makes up for
template <class T>
using Engine = std::conditional_t<std::is_same_v<T, BFloat16>, Halfwords, Wide>;
#else
template <class E>
constexpr float FP8_UNIT = 1.0f;
template <class T>
using Engine = Wide;
#endif

// Some of one output's weights: their bytes, and a scale (and zero) for each group.
struct Part {
  const uint8_t* bytes;
  const BFloat16* scales;
  const uint8_t* zeros;
};

// The shape's counts that follow from the kind of weights. GROUP: planes that share a scale; 0: the whole output does.
template <Bits B, int GROUP>
struct Sizes {
  static constexpr int64_t BYTES = block_bytes(B), GROUPS = GROUP ? PLANES / std::max(GROUP, 1) : 0;
  int64_t whole, blocks, row_bytes;  // whole blocks of the depth, all of them, bytes of an output

  explicit Sizes(const QuantisedShape& s)
      : whole(s.depth / BLOCK), blocks((s.depth + BLOCK - 1) / BLOCK),
        row_bytes(BYTES == BLOCK ? s.depth : blocks * BYTES) {}

  Part output(const QuantisedWeights& w, int64_t at, int64_t groups) const {
    return {w.data + at * row_bytes, w.scales + at * groups, w.zeros ? w.zeros + at * groups : nullptr};
  }
  static Part block(const Part& output, int64_t b) {
    return {output.bytes + b * BYTES, output.scales + b * GROUPS, output.zeros ? output.zeros + b * GROUPS : nullptr};
  }
};

// The block at the end of the depth where it is not whole: zeros follow.
struct Rest {
  uint8_t bytes[BLOCK] = {}, zeros[PLANES] = {};
  BFloat16 scales[PLANES] = {};

  Rest(const Part& block, int64_t count, int64_t groups) {
    std::memcpy(bytes, block.bytes, size_t(count));
    std::memcpy(scales, block.scales, size_t(groups) * sizeof(BFloat16));
    if (block.zeros) std::memcpy(zeros, block.zeros, size_t(groups));
  }
  Part part() const { return {bytes, scales, zeros}; }
};
template <Bits B, int GROUP>
Rest rest_of(const Part& output, const Sizes<B, GROUP>& sizes, const QuantisedShape& s) {
  int64_t count = sizes.row_bytes - sizes.whole * sizes.BYTES;
  return {sizes.block(output, sizes.whole), count, GROUP ? s.groups - sizes.whole * sizes.GROUPS : 0};
}

template <class E, Bits B, int GROUP>
ALWAYS_INLINE typename E::Piece plane_of(const Part& block, int plane) {
  int zero = B == Bits::int4_zeros ? block.zeros[GROUP ? plane / std::max(GROUP, 1) : 0] : 8;
  return E::template widen_plane<B>(block.bytes, plane, zero);
}

// sums [COUNT][R] += one block: plane(o, p) is plane p of the weights of output o, scales(o) are the scales there.
template <class E, int GROUP, int R, int COUNT, class Plane, class Scales>
ALWAYS_INLINE void add_block(Vec (*sums)[R], const Plane& plane, const Scales& scales, const typename E::Element* x,
                             int64_t x_stride) {
  Vec parts[COUNT][R] = {};
#pragma GCC unroll 4
  for (int p = 0; p < PLANES; ++p) {
    typename E::Piece rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rows[r] = E::plane(x + r * x_stride + p * PLANE);
#pragma GCC unroll 4
    for (int o = 0; o < COUNT; ++o) {
      auto weight = plane(o, p);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec& sum = GROUP ? parts[o][r] : sums[o][r];
        sum = E::multiply(sum, weight, rows[r]);
      }
      if (GROUP && (p + 1) % std::max(GROUP, 1) == 0) {
        float scale = widen(scales(o)[p / std::max(GROUP, 1)]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[o][r] += parts[o][r] * scale, parts[o][r] = Vec{};
      }
    }
  }
}

// The end of the depth, the scale of a whole output and the bias; result [R, columns] at the output `first`.
template <class E, class T, Bits B, int GROUP, int R, int COUNT>
ALWAYS_INLINE void finish(Vec (*sums)[R], const Part* output, const typename E::Element* x, const T* bias, T* result,
                          int64_t first, const QuantisedShape& s) {
  Sizes<B, GROUP> sizes(s);
  for (int o = 0; o < COUNT; ++o) {
    if (sizes.whole < sizes.blocks) {
      Rest rest = rest_of<B, GROUP>(output[o], sizes, s);
      auto plane = [&](int, int p) { return plane_of<E, B, GROUP>(rest.part(), p); };
      auto scales = [&](int) { return rest.scales; };
      add_block<E, GROUP, R, 1>(sums + o, plane, scales, x + sizes.whole * BLOCK, sizes.blocks * BLOCK);
    }
    float scale = (GROUP ? 1.0f : widen(output[o].scales[0])) * (B == Bits::fp8 ? FP8_UNIT<E> : 1.0f);
    for (int r = 0; r < R; ++r) {
      Vec value = splat(sum(sums[o][r]) * scale + (bias ? widen(bias[first + o]) : 0.0f));
      store(result + r * s.columns + first + o, value, 1);
    }
  }
}

// COUNT outputs of R rows.
template <class E, class T, Bits B, int GROUP, int R, int COUNT>
void few_rows(const QuantisedWeights& w, const typename E::Element* x, const T* bias, T* result, int64_t first,
              const QuantisedShape& s) {
  Sizes<B, GROUP> sizes(s);
  Part output[COUNT];
  for (int o = 0; o < COUNT; ++o) output[o] = sizes.output(w, first + o, s.groups);
  Vec sums[COUNT][R] = {};
  for (int64_t b = 0; b < sizes.whole; ++b) {
    for (int o = 0; o < COUNT; ++o)
      prefetch_ahead<B>(sizes.block(output[o], b).bytes + COUNT * sizes.row_bytes);
    auto plane = [&](int o, int p) { return plane_of<E, B, GROUP>(sizes.block(output[o], b), p); };
    auto scales = [&](int o) { return sizes.block(output[o], b).scales; };
    add_block<E, GROUP, R, COUNT>(sums, plane, scales, x + b * BLOCK, sizes.blocks * BLOCK);
  }
  finish<E, T, B, GROUP, R, COUNT>(sums, output, x, bias, result, first, s);
}

// carried [COUNT][R] += blocks from ... to, whose weights are widened.
template <class E, Bits B, int GROUP, int R, int COUNT>
void add_widened(Vec* carried, const typename E::Piece* widened, const Part* output, const typename E::Element* x,
                 int64_t from, int64_t to, int64_t x_stride) {
  Vec sums[COUNT][R];
  for (int o = 0; o < COUNT; ++o)
    for (int r = 0; r < R; ++r) sums[o][r] = from ? carried[o * R + r] : Vec{};
  for (int64_t b = from; b < to; ++b) {
    auto plane = [&](int o, int p) { return widened[(o * WIDENED + b - from) * PLANES + p]; };
    auto scales = [&](int o) { return Sizes<B, GROUP>::block(output[o], b).scales; };
    add_block<E, GROUP, R, COUNT>(sums, plane, scales, x + b * BLOCK, x_stride);
  }
  for (int o = 0; o < COUNT; ++o)
    for (int r = 0; r < R; ++r) carried[o * R + r] = sums[o][r];
}

// More rows than one pass takes: the weights of COUNT outputs are widened into the nearest cache, some at a time.
template <class E, class T, Bits B, int GROUP, int COUNT>
void many_rows(const QuantisedWeights& w, const typename E::Element* x, const T* bias, T* result, int64_t first,
               const QuantisedShape& s) {
  using Piece = typename E::Piece;
  Sizes<B, GROUP> sizes(s);
  int64_t stride = sizes.blocks * BLOCK, fours = s.rows / ROWS * ROWS;
  Piece* widened = static_cast<Piece*>(scratch(0, size_t(COUNT * WIDENED * PLANES) * sizeof(Piece)));
  Vec* carried = static_cast<Vec*>(scratch(1, size_t(s.rows * COUNT) * sizeof(Vec)));
  std::memset(carried, 0, size_t(s.rows * COUNT) * sizeof(Vec));
  Part output[COUNT];
  for (int o = 0; o < COUNT; ++o) output[o] = sizes.output(w, first + o, s.groups);
  for (int64_t from = 0; from < sizes.whole; from += WIDENED) {
    int64_t to = std::min(sizes.whole, from + WIDENED);
    for (int o = 0; o < COUNT; ++o)
      for (int64_t b = from; b < to; ++b) {
        Part block = sizes.block(output[o], b);
        prefetch_ahead<B>(block.bytes + COUNT * sizes.row_bytes);
#pragma GCC unroll 4
        for (int p = 0; p < PLANES; ++p)
          widened[(o * WIDENED + b - from) * PLANES + p] = plane_of<E, B, GROUP>(block, p);
      }
    for (int64_t row = 0; row < fours; row += ROWS)
      add_widened<E, B, GROUP, ROWS, COUNT>(carried + row * COUNT, widened, output, x + row * stride, from, to, stride);
    for (int64_t row = fours; row < s.rows; ++row)
      add_widened<E, B, GROUP, 1, COUNT>(carried + row * COUNT, widened, output, x + row * stride, from, to, stride);
  }
  for (int64_t row = 0; row < fours; row += ROWS)
    finish<E, T, B, GROUP, ROWS, COUNT>(reinterpret_cast<Vec(*)[ROWS]>(carried + row * COUNT), output, x + row * stride,
                                        bias, result + row * s.columns, first, s);
  for (int64_t row = fours; row < s.rows; ++row)
    finish<E, T, B, GROUP, 1, COUNT>(reinterpret_cast<Vec(*)[1]>(carried + row * COUNT), output, x + row * stride, bias,
                                     result + row * s.columns, first, s);
}

template <class E, class T, Bits B, int GROUP, int COUNT>
void by_rows(const QuantisedWeights& w, const typename E::Element* x, const T* bias, T* result, int64_t first,
             const QuantisedShape& s) {
  if (s.rows > ROWS) return many_rows<E, T, B, GROUP, COUNT>(w, x, bias, result, first, s);
  if (s.rows == 4) return few_rows<E, T, B, GROUP, 4, COUNT>(w, x, bias, result, first, s);
  if (s.rows == 3) return few_rows<E, T, B, GROUP, 3, COUNT>(w, x, bias, result, first, s);
  if (s.rows == 2) return few_rows<E, T, B, GROUP, 2, COUNT>(w, x, bias, result, first, s);
  few_rows<E, T, B, GROUP, 1, COUNT>(w, x, bias, result, first, s);
}

template <class E, class T>
typename E::Element* padded_rows(const T* x, Bits bits, const QuantisedShape& s) {
  using Element = typename E::Element;
  int64_t stride = (s.depth + BLOCK - 1) / BLOCK * BLOCK;
  Element* padded = static_cast<Element*>(scratch(3, size_t(s.rows * stride) * sizeof(Element)));
  std::memset(padded, 0, size_t(s.rows * stride) * sizeof(Element));
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t k = 0; k < s.depth; ++k) padded[r * stride + E::place(bits, k)] = E::element(x[r * s.depth + k]);
  return padded;
}

template <class T, Bits B, int GROUP>
void all_rows(const QuantisedWeights& w, const T* x, const T* bias, T* result, const QuantisedShape& s) {
  using E = Engine<T>;
  if (!s.rows) return;
  auto padded = padded_rows<E>(x, B, s);
  parallel((s.columns + OUTPUTS_PER_TASK - 1) / OUTPUTS_PER_TASK, [&](int64_t task) {
    int64_t at = task * OUTPUTS_PER_TASK, end = std::min(s.columns, at + OUTPUTS_PER_TASK);
    for (; at + OUTPUTS <= end; at += OUTPUTS) by_rows<E, T, B, GROUP, OUTPUTS>(w, padded, bias, result, at, s);
    for (; at < end; ++at) by_rows<E, T, B, GROUP, 1>(w, padded, bias, result, at, s);
  });
}

template <class T, Bits B>
void by_group(const QuantisedWeights& w, const T* x, const T* bias, T* result, const QuantisedShape& s) {
  if (s.group == PLANE) return all_rows<T, B, 1>(w, x, bias, result, s);
  if (s.group == 2 * PLANE) return all_rows<T, B, 2>(w, x, bias, result, s);
  if (s.group == 4 * PLANE) return all_rows<T, B, 4>(w, x, bias, result, s);
  if constexpr (B == Bits::int8 || B == Bits::fp8) all_rows<T, B, 0>(w, x, bias, result, s);
}

}  // namespace

template <class T>
void quantised_linear(const QuantisedWeights& w, const T* x, const T* bias, T* result, const QuantisedShape& s) {
  switch (w.bits) {
    case Bits::int8: return by_group<T, Bits::int8>(w, x, bias, result, s);
    case Bits::fp8: return all_rows<T, Bits::fp8, 0>(w, x, bias, result, s);
    case Bits::int4: return by_group<T, Bits::int4>(w, x, bias, result, s);
    case Bits::int4_zeros: return by_group<T, Bits::int4_zeros>(w, x, bias, result, s);
  }
}

template void quantised_linear<float>(const QuantisedWeights&, const float*, const float*, float*,
                                      const QuantisedShape&);
template void quantised_linear<BFloat16>(const QuantisedWeights&, const BFloat16*, const BFloat16*, BFloat16*,
                                         const QuantisedShape&);

}  // namespace liaoyuan

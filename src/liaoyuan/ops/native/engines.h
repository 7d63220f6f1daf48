// The micro-kernels of matrix products, which matrix.cpp puts to work: lanes of fp32 on any machine (LaneProducts),
// AVX-512's dot products of bf16 pairs (PairProducts), AMX's tiles of them (TileProducts).
//
// A word is what one step along the depth takes of an operand: an fp32 value, or a pair of bf16 values. One operand
// lies along the lanes: its panels are packed as words [steps, width]. The other's items are rows of words, in place
// where they can be read so. Each element is summed step by step, in an order that depends on the depth alone.
#pragma once
#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "kernels.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace liaoyuan {

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class Word>
struct Items {
  const Word* words;
  int64_t stride;  // words from item to item
  Items from(int64_t item) const { return {words + item * stride, stride}; }
};

constexpr int REGISTERS = sizeof(Vec) / sizeof(Register), WIDTH = LANES / REGISTERS;

// sums, in registers, += one step along the depth: a word of each item times a row of a panel.
template <class E, int COUNT, int PARTS, class Word>
[[gnu::always_inline]] inline void add_step(Register (&sum)[COUNT][PARTS], Items<Word> items, const Word* row) {
  Register lanes[PARTS];
#pragma GCC unroll 8
  for (int n = 0; n < PARTS; ++n) {
    std::memcpy(&lanes[n], row + n * WIDTH, sizeof(Register));
    hold(lanes[n]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < COUNT; ++i) {
    Word word;
    std::memcpy(&word, items.words + i * items.stride, sizeof word);
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; ++n) E::add_product(sum[i][n], word, lanes[n]);
  }
}
// The sums of items that lie PANEL floats apart.
template <int PANEL, int COUNT, int PARTS>
[[gnu::always_inline]] inline void load_sums(Register (&sum)[COUNT][PARTS], const float* from) {
#pragma GCC unroll 12
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; ++n) std::memcpy(&sum[i][n], from + i * PANEL + n * WIDTH, sizeof(Register));
}
template <int PANEL, int COUNT, int PARTS>
[[gnu::always_inline]] inline void store_sums(const Register (&sum)[COUNT][PARTS], float* to) {
#pragma GCC unroll 12
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < PARTS; ++n) std::memcpy(to + i * PANEL + n * WIDTH, &sum[i][n], sizeof(Register));
}

// sums [items, E::PANEL] (+)= items times a panel, held in vector registers. E::add_product multiplies words.
template <class E, class Word>
struct VectorProducts {
  static constexpr int VECTORS = REGISTERS == 1 ? 4 : 1, PANEL = VECTORS * LANES;
  static constexpr int SUMS = REGISTERS == 1 ? 24 : REGISTERS == 2 ? 12 : 8;  // registers: 32 of 64 bytes, else 16
  static constexpr int STRIP = REGISTERS == 1 ? 64 : 48;  // items that are worked on together
  static constexpr int STEP = 1;                          // steps are a multiple of it
  static constexpr int64_t CUT = 192;  // steps between two visits of the sums: a panel stays in the first cache
  static constexpr int64_t FEW = 8;    // up to so many items the panels are packed by those who need them
  static constexpr bool WHOLE_STRIPS = false;  // whether an item past the end is read
  static constexpr int64_t TASK_PANELS = REGISTERS == 1 ? 4 : 8, TASK_STRIPS = 8;  // sums stay in the second cache
  static void begin() {}
  static void end() {}

  static void strip(Items<Word> items, int64_t count, const Word* panel, int64_t width, int64_t steps, bool add,
                    float* sums) {
    if (width == PANEL) return strip_of<VECTORS>(items, count, panel, steps, add, sums);
    if constexpr (VECTORS > 1) {
      if (width == 3 * LANES) return strip_of<3>(items, count, panel, steps, add, sums);
      if (width == 2 * LANES) return strip_of<2>(items, count, panel, steps, add, sums);
      strip_of<1>(items, count, panel, steps, add, sums);
    }
  }

 private:
  template <int V>
  static void strip_of(Items<Word> items, int64_t count, const Word* panel, int64_t steps, bool add, float* sums) {
    // As many rows as a set of the first cache has ways: at a stride of 4 KiB they would push each other out.
    constexpr int WAYS = 12, COUNT = std::min(WAYS, SUMS / (V * REGISTERS)), FEWER = COUNT > 4 ? 4 : 1;
    int64_t i = 0;
    for (; i + COUNT <= count; i += COUNT) tile<COUNT, V>(items.from(i), panel, steps, add, sums + i * PANEL);
    for (; i + FEWER <= count; i += FEWER) tile<FEWER, V>(items.from(i), panel, steps, add, sums + i * PANEL);
    for (; i < count; ++i) tile<1, V>(items.from(i), panel, steps, add, sums + i * PANEL);
  }

  // Not inlined: among other code the compiler moves the sums from register to register.
  template <int COUNT, int V>
  [[gnu::noinline]] static void tile(Items<Word> items, const Word* panel, int64_t steps, bool add, float* sums) {
    constexpr int PARTS = V * REGISTERS;
    Register sum[COUNT][PARTS] = {};
    if (add) load_sums<PANEL>(sum, sums);
    for (int64_t step = 0; step < steps; ++step) {
      if (step % LANES == 0)
        for (int i = 0; i < COUNT; ++i) __builtin_prefetch(items.words + (COUNT + i) * items.stride + step, 0, 2);
      add_step<E>(sum, {items.words + step, items.stride}, panel + step * V * LANES);
    }
    store_sums<PANEL>(sum, sums);
  }
};

// Words of one fp32 value; bf16 is widened while it is packed.
template <class T>
struct LaneProducts : VectorProducts<LaneProducts<T>, float> {
  using Word = float;
  static constexpr int VALUES = 1;  // of the depth in a word
  static constexpr bool IN_PLACE = std::is_same_v<T, float>;  // whether words can be read where the values lie
  // Whether a few items' products with a matrix along the depth turn its words in registers.
  static constexpr bool STREAMS = REGISTERS <= 2;
  // What lies in a word of memory, one register for each step along the depth.
  static constexpr int SPLIT = 4 / sizeof(T);
  static void split(Register column, Register (&steps)[SPLIT]) {
    if constexpr (SPLIT == 2) {
      RegisterWords words = (RegisterWords)column;
      steps[0] = (Register)(words << 16), steps[1] = (Register)(words & 0xffff0000u);
    } else {
      steps[0] = column;
    }
  }
  static void add_product(Register& sum, float item, Register lanes) { sum = fused(item - Register{}, lanes, sum); }
  // Up to 16 words along the depth; zeros past its end.
  static Vec along(const T* from, int64_t values) { return load(from, values); }
  // A word of each of up to 16 items that lie side by side; `next` is the second value's row, or null.
  static Vec across(const T* row, const T*, int64_t items) { return load(row, items); }
  // The same of SIDE items.
  static constexpr int SIDE = LANES;
  static void side_by_side(const T* row, const T*, float* to) { write(to, load(row)); }
};

struct PairWords {
  using Word = uint32_t;
  static constexpr int VALUES = 2;
  static constexpr bool IN_PLACE = true;
  static Vec along(const BFloat16* from, int64_t values) {
    Vec words{};
    if (values >= 2 * LANES)
      read(from, words);
    else
      std::memcpy(&words, from, size_t(values) * sizeof(BFloat16));
    return words;
  }
  static Vec across(const BFloat16* row, const BFloat16* next, int64_t items) {
    WordVec low = (WordVec)load(row, items) >> 16;
    return (Vec)(next ? low | (WordVec)load(next, items) : low);
  }
#ifdef __AVX512BW__
  static constexpr int SIDE = 2 * LANES;
  static void side_by_side(const BFloat16* row, const BFloat16* next, uint32_t* to) {
    __m512i low = _mm512_loadu_si512(row), high = _mm512_loadu_si512(next);
    __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                     36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, first, high));
    _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi16(low, second, high));
  }
#else
  static constexpr int SIDE = LANES;
  static void side_by_side(const BFloat16* row, const BFloat16* next, uint32_t* to) {
    write(to, across(row, next, LANES));
  }
#endif
};

#ifdef __AVX512BF16__
struct PairProducts : PairWords, VectorProducts<PairProducts, uint32_t> {
  static constexpr bool STREAMS = true;
  static constexpr int SPLIT = 1;
  static void split(Register column, Register (&steps)[1]) { steps[0] = column; }
  static void add_product(Register& sum, uint32_t item, Register lanes) {
    sum = (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(int(item)));
  }
};
#endif

#ifdef HAS_AMX
// Two by two tiles of sums. Items are the left operand, a panel the right one.
struct TileProducts : PairWords, Tiles {
  static constexpr int PANEL = 2 * LANES, STRIP = 2 * LANES, STEP = LANES;
  // A strip and a panel, 20 KiB each, stay in a first cache of 48 KiB with their sums. The panels of a task stream from
  // the second one: with the sums 28 KiB in the 640 cycles that the tiles of a cut take.
  static constexpr int64_t CUT = 10 * STEP, TASK_PANELS = 8, TASK_STRIPS = 8;
  static constexpr bool STREAMS = false;
  static constexpr int64_t FEW = 0;  // a tile of lanes costs the same however few are used, and needs no copy
  static constexpr bool WHOLE_STRIPS = true;

  static void strip(Items<Word> items, int64_t count, const Word* panel, int64_t width, int64_t steps, bool add,
                    float* sums) {
    written();
    auto tile = count > LANES ? (width == PANEL ? &block<2, 2> : &block<2, 1>)
                              : (width == PANEL ? &block<1, 2> : &block<1, 1>);
    tile(items, panel, steps, add, sums);
  }

 private:
  template <int M, int N>
  static void block(Items<Word> items, const Word* panel, int64_t steps, bool add, float* sums) {
    constexpr int64_t ROW = PANEL * 4, PANEL_ROW = N * LANES * 4;  // bytes
    float* lower = sums + LANES * PANEL;
    const Word* second = items.words + LANES * items.stride;
    _tile_zero(0);
    if constexpr (M == 2) _tile_zero(1);
    if constexpr (N == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
    if (add) {
      _tile_loadd(0, sums, ROW);
      if constexpr (M == 2) _tile_loadd(1, lower, ROW);
      if constexpr (N == 2) _tile_loadd(2, sums + LANES, ROW);
      if constexpr (M == 2 && N == 2) _tile_loadd(3, lower + LANES, ROW);
    }
    for (int64_t step = 0; step < steps; step += LANES) {
      _tile_loadd(6, panel + step * N * LANES, PANEL_ROW);
      _tile_loadd(4, items.words + step, items.stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (M == 2) {
        _tile_loadd(5, second + step, items.stride * 4);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (N == 2) {
        _tile_loadd(7, panel + (step * N + 1) * LANES, PANEL_ROW);
        _tile_dpbf16ps(2, 4, 7);
        if constexpr (M == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, ROW);
    if constexpr (M == 2) _tile_stored(1, lower, ROW);
    if constexpr (N == 2) _tile_stored(2, sums + LANES, ROW);
    if constexpr (M == 2 && N == 2) _tile_stored(3, lower + LANES, ROW);
  }
};
#endif

}  // namespace liaoyuan

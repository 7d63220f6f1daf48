// Products of rows with a panel of widened weights (quantised.cpp) [planes, steps of a plane, width].
//
// The order of a sum is the same however many rows there are. With scales: each plane is summed from zero, and its sum
// times its scale is added to those before it. Without: a block's four planes have a sum each, along all blocks, so
// that a row alone need not wait for the sum before; `total_of` adds them. AMX's tiles have one sum along the depth.
#pragma once
#include "byte_rows.h"
#include "engines.h"

namespace liaoyuan {

constexpr int VECTORS = REGISTERS == 1 ? 2 : 1, PANEL = VECTORS * LANES;  // of a panel, at most

// Memory that is needed later, asked for little by little: much at once would have to wait.
struct Ahead {
  const uint8_t* next;
  int64_t lines;  // at a time
  void ask() {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Which part of the depth is multiplied: so many blocks, at least one. scales [planes / of_scale, width] or null.
struct Cut {
  int64_t blocks, of_scale;
  const float* scales;
  Ahead* ahead;
};

template <class E>
constexpr int PLANE_STEPS = PLANE / E::VALUES;
// Sums that an element has while it is not complete.
template <class E, bool SCALED>
constexpr int CHAINS = SCALED || E::WHOLE_STRIPS ? 1 : PLANES;

// sums of one chain += steps of one plane, in registers.
template <class E, int COUNT, int PARTS>
ALWAYS_INLINE void add_plane(Register (&sum)[COUNT][PARTS], Items<typename E::Word> x, const typename E::Word* panel) {
#pragma GCC unroll 4
  for (int64_t step = 0; step < PLANE_STEPS<E>; ++step)
    add_step<E>(sum, {x.words + step, x.stride}, panel + step * PARTS * WIDTH);
}

// sums [chains, rows, PANEL] += COUNT rows times a panel of V vectors; chains lie `apart` floats apart. Not inlined, as
// in engines.h.
template <class E, bool SCALED, int V, int COUNT>
[[gnu::noinline]] void add_rows(Items<typename E::Word> x, const typename E::Word* panel, const Cut& cut, float* sums,
                                int64_t apart) {
  constexpr int PARTS = V * REGISTERS;
  constexpr int64_t STEPS = PLANE_STEPS<E>, WORDS = STEPS * V * LANES;  // of a plane
  Register sum[COUNT][PARTS];
  if constexpr (SCALED) {
    load_sums<PANEL>(sum, sums);
    int64_t p = 0;
    do {
      cut.ahead->ask();
      Register part[COUNT][PARTS] = {};
      add_plane<E>(part, {x.words + p * STEPS, x.stride}, panel + p * WORDS);
#pragma GCC unroll 8
      for (int n = 0; n < PARTS; ++n) {
        Register scale;
        std::memcpy(&scale, cut.scales + p / cut.of_scale * V * LANES + n * WIDTH, sizeof scale);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) sum[r][n] = fused(part[r][n], scale, sum[r][n]);
      }
    } while (++p < cut.blocks * PLANES);
    store_sums<PANEL>(sum, sums);
  } else {
    for (int64_t chain = 0; chain < PLANES; ++chain) {
      load_sums<PANEL>(sum, sums + chain * apart);
      int64_t p = chain;
      do {
        cut.ahead->ask();
        add_plane<E>(sum, {x.words + p * STEPS, x.stride}, panel + p * WORDS);
      } while ((p += PLANES) < cut.blocks * PLANES);
      store_sums<PANEL>(sum, sums + chain * apart);
    }
  }
}

// The same of any number of rows, in equal parts: a part of one or two would leave the units idle.
template <class E, bool SCALED, int V>
constexpr int MOST_ROWS = std::max(1, E::SUMS / (V * REGISTERS * (SCALED ? 2 : 1)));

template <class E, bool SCALED, int V, int COUNT = MOST_ROWS<E, SCALED, V>>
void add_part(int64_t count, Items<typename E::Word> x, const typename E::Word* panel, const Cut& cut, float* sums,
              int64_t apart) {
  if (count == COUNT) return add_rows<E, SCALED, V, COUNT>(x, panel, cut, sums, apart);
  if constexpr (COUNT > 1) add_part<E, SCALED, V, COUNT - 1>(count, x, panel, cut, sums, apart);
}
template <class E, bool SCALED, int V = VECTORS>
void add_all_rows(int64_t count, Items<typename E::Word> x, const typename E::Word* panel, int64_t width,
                  const Cut& cut, float* sums) {
  if constexpr (V > 1)
    if (width < V * LANES) return add_all_rows<E, SCALED, V - 1>(count, x, panel, width, cut, sums);
  constexpr int64_t MOST = std::min(12, MOST_ROWS<E, SCALED, V>);
  int64_t times = parts(count, MOST);
  cut.ahead->lines = 1 + cut.ahead->lines / (times * cut.blocks * PLANES);
  for (int64_t i = 0; i < times; ++i) {
    int64_t first = count * i / times, end = count * (i + 1) / times;
    add_part<E, SCALED, V, int(MOST)>(end - first, x.from(first), panel, cut, sums + first * PANEL, count * PANEL);
  }
}

#ifdef HAS_AMX
template <bool SCALED>
void add_tiles(int64_t count, Items<uint32_t> x, const uint32_t* panel, int64_t width, const Cut& cut, float* sums) {
  using E = TileProducts;
  static_assert(E::PANEL == PANEL && E::STEP == PLANE_STEPS<E>);
  constexpr int64_t STEPS = PLANE_STEPS<E>;
  alignas(64) float part[E::STRIP * PANEL];
  for (int64_t row = 0; row < count; row += E::STRIP) {
    Items<uint32_t> strip = x.from(row);
    int64_t rows = std::min<int64_t>(E::STRIP, count - row), planes = cut.blocks * PLANES;
    float* own = sums + row * PANEL;
    if (!SCALED) E::strip(strip, rows, panel, width, planes * STEPS, true, own);
    for (int64_t p = 0; SCALED && p < planes; ++p) {
      E::strip({strip.words + p * STEPS, x.stride}, rows, panel + p * STEPS * width, width, STEPS, false, part);
      for (int64_t n = 0; n < width; n += LANES) {
        Vec scale = load(cut.scales + p / cut.of_scale * width + n);
        for (int64_t at = n; at < rows * PANEL; at += PANEL) store(own + at, load(own + at) + load(part + at) * scale);
      }
    }
  }
}
#endif

// sums [CHAINS, count, PANEL] += `count` rows times a panel that is `width` outputs wide.
template <class E, bool SCALED>
void add_products(int64_t count, Items<typename E::Word> x, const typename E::Word* panel, int64_t width,
                  const Cut& cut, float* sums) {
#ifdef HAS_AMX
  if constexpr (E::WHOLE_STRIPS) return add_tiles<SCALED>(count, x, panel, width, cut, sums);
#endif
  if constexpr (!E::WHOLE_STRIPS) add_all_rows<E, SCALED>(count, x, panel, width, cut, sums);
}

inline Vec total_of(const Vec (&sums)[1]) { return sums[0]; }
inline Vec total_of(const Vec (&sums)[PLANES]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

}  // namespace liaoyuan

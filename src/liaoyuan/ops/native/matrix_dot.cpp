// Products of bf16 matrices by AVX-512's dot products of pairs, for any of the four storage orders.
//
// Lanes run along the rows of one operand, packed ahead in pairs of the depth; elements of the other are read where
// they lie, or from packed pairs if they are stored across the depth, and spread over the lanes. The lanes' operand is
// the left one where the right one is a weight stored along the depth: so few rows need no copy of the weight, and the
// product comes out turned. Each element is summed along the depth in one order whatever the other sizes are, and in
// whichever tile it falls.
#include <algorithm>

#include "tiles.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace liaoyuan {

#ifdef __AVX512BF16__
namespace {

constexpr int64_t PANEL = 3 * LANES;  // rows of a that are worked on together
constexpr int64_t STRIP = 64;     // columns of c that are turned and stored together
constexpr int64_t DEPTH_CUT = 256;  // pairs of the depth between two visits of a tile: its panel stays in the first cache
constexpr int64_t STRIPS_PER_TASK = 8, PANELS_PER_TASK = 4;  // their sums stay in the second cache

// Turn 16 rows of 16 words each.
void turn(const __m512i* rows, uint32_t* to, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * stride, _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * stride, _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd));
  }
}

// 16 items of a matrix stored along the depth: pairs p ... p + 15, zeros past the ends.
void pack_along(const BFloat16* from, int64_t stride, int64_t items, int64_t depth, int64_t p, uint32_t* to,
                int64_t step) {
  __m512i rows[16];
  int64_t left = std::clamp<int64_t>(depth - 2 * p, 0, 32);
  __mmask32 mask = left == 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  for (int i = 0; i < 16; ++i)
    rows[i] = i < items ? _mm512_maskz_loadu_epi16(mask, from + i * stride + 2 * p) : _mm512_setzero_si512();
  turn(rows, to, step);
}

// 16 items of a matrix stored across the depth: one pair, zeros past the ends.
void pack_across(const BFloat16* from, int64_t stride, int64_t items, int64_t depth, int64_t p, uint32_t* to) {
  __mmask16 mask = items >= 16 ? __mmask16(0xffff) : __mmask16((1u << items) - 1);
  const BFloat16* row = from + 2 * p * stride;
  __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  __m512i high = 2 * p + 1 < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + stride))
                                   : _mm512_setzero_si512();
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

struct Source {  // `count` items of `depth` elements; along: an item's elements follow each other
  const BFloat16* matrix;
  int64_t stride, count, depth;
  bool along;
};

// Items first ... first + count - 1, a multiple of 16, as words [pairs, step]; zeros past the ends.
void pack(const Source& s, int64_t first, int64_t count, uint32_t* to, int64_t step) {
  int64_t pairs = (s.depth + 1) / 2;
  alignas(64) uint32_t rest[16 * LANES];
  for (int64_t i = 0; i < count; i += LANES) {
    int64_t items = std::clamp<int64_t>(s.count - first - i, 0, LANES), p = 0;
    if (!s.along) {
      for (; p < pairs; ++p) pack_across(s.matrix + first + i, s.stride, items, s.depth, p, to + p * step + i);
      continue;
    }
    const BFloat16* from = s.matrix + (first + i) * s.stride;
    for (; p + 16 <= pairs; p += 16) pack_along(from, s.stride, items, s.depth, p, to + p * step + i, step);
    if (p == pairs) continue;
    pack_along(from, s.stride, items, s.depth, p, rest, LANES);
    for (int64_t r = 0; p + r < pairs; ++r)
      std::memcpy(to + (p + r) * step + i, rest + r * LANES, LANES * sizeof(uint32_t));
  }
}

// sums [COUNT, VECTORS * 16] (+)= over the pairs, item by item of b.
template <int COUNT, int VECTORS>
void tile(const uint32_t* b, int64_t per_pair, int64_t per_item, const uint32_t* panel, int64_t pairs, bool add,
          float* sums) {
  __m512 sum[COUNT][VECTORS];
#pragma GCC unroll 24
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v)
      sum[i][v] = add ? _mm512_loadu_ps(sums + i * PANEL + v * LANES) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh lanes[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v)
      lanes[v] = (__m512bh)_mm512_loadu_si512(panel + (p * VECTORS + v) * LANES);
#pragma GCC unroll 24
    for (int i = 0; i < COUNT; ++i) {
      __m512bh one = (__m512bh)_mm512_set1_epi32(int(b[i * per_item + p * per_pair]));
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], lanes[v], one);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(sums + i * PANEL + v * LANES, sum[i][v]);
}

// The same of `count` items.
template <int VECTORS>
void strip(const uint32_t* b, int64_t per_pair, int64_t per_item, int64_t count, const uint32_t* panel, int64_t pairs,
           bool add, float* sums) {
  constexpr int COUNT = 24 / VECTORS;
  int64_t i = 0;
  for (; i + COUNT <= count; i += COUNT)
    tile<COUNT, VECTORS>(b + i * per_item, per_pair, per_item, panel, pairs, add, sums + i * PANEL);
  for (; i + 4 <= count; i += 4)
    tile<4, VECTORS>(b + i * per_item, per_pair, per_item, panel, pairs, add, sums + i * PANEL);
  for (; i < count; ++i) tile<1, VECTORS>(b + i * per_item, per_pair, per_item, panel, pairs, add, sums + i * PANEL);
}

// Up to 16 of a row's elements, i and those after it, with the bias, rounded once.
void store_part(__m512 sums, const BFloat16* bias, int64_t i, int64_t columns, BFloat16* row) {
  int64_t width = columns - i;
  __mmask16 mask = width >= LANES ? __mmask16(0xffff) : __mmask16((1u << width) - 1);
  if (bias) sums += (__m512)load(bias + i, width);
  _mm256_mask_storeu_epi16(row + i, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

// c [rows, columns], from sums [columns, rows]; whole lines of memory are written at a time.
void store_turned(const float* sums, const BFloat16* bias, BFloat16* c, int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) uint32_t turned[STRIP / LANES][LANES * LANES];
  __m512i block[LANES];
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t i = 0; i < columns; i += LANES) {
      for (int64_t k = 0; k < LANES; ++k)
        block[k] = _mm512_loadu_si512(sums + std::min(i + k, columns - 1) * PANEL + r);
      turn(block, turned[i / LANES], LANES);
    }
    for (int64_t k = 0; k < std::min<int64_t>(LANES, rows - r); ++k)
      for (int64_t i = 0; i < columns; i += LANES)
        store_part(_mm512_load_ps(turned[i / LANES] + k * LANES), bias, i, columns, c + (r + k) * stride);
  }
}

// c [rows, columns], from sums of the same order.
void store_rows(const float* sums, const BFloat16* bias, BFloat16* c, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += LANES)
      store_part(_mm512_loadu_ps(sums + r * PANEL + i), bias, i, columns, c + r * stride);
}

// Up to eight rows of a: it is the weight's columns that lie along the lanes, turned 16 x 16 words at a time. The order
// of the sums is that of the tiles, so the bits are too.
template <int ROWS>
void few_rows(const uint32_t* a, int64_t a_step, const Source& weight, const BFloat16* bias, BFloat16* c, int64_t stride) {
  constexpr int64_t AHEAD = 256;  // bytes
  constexpr int64_t GROUPS = 2, WIDTH = GROUPS * LANES, BLOCKS_PER_TASK = 4;  // two sums under way hide the latency
  int64_t pairs = (weight.depth + 1) / 2, blocks = (weight.count + WIDTH - 1) / WIDTH;
  parallel((blocks + BLOCKS_PER_TASK - 1) / BLOCKS_PER_TASK, [&](int64_t task) {
    alignas(64) uint32_t turned[GROUPS][LANES * LANES];
    for (int64_t at = task * BLOCKS_PER_TASK * WIDTH, n = 0; n < BLOCKS_PER_TASK && at < weight.count; ++n, at += WIDTH) {
      __m512 sum[GROUPS][ROWS] = {};
      for (int64_t p = 0; p < pairs; p += LANES) {
        for (int64_t i = 0; i < std::min(WIDTH, weight.count - at); ++i)  // more rows than the hardware follows
          _mm_prefetch(reinterpret_cast<const char*>(weight.matrix + (at + i) * weight.stride + 2 * p) + AHEAD, _MM_HINT_T0);
        for (int64_t g = 0; g < GROUPS; ++g)
          pack_along(weight.matrix + (at + g * LANES) * weight.stride, weight.stride, weight.count - at - g * LANES,
                     weight.depth, p, turned[g], LANES);
        for (int64_t q = 0; q < LANES; ++q)
#pragma GCC unroll 2
          for (int g = 0; g < GROUPS; ++g)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
              sum[g][r] = _mm512_dpbf16_ps(sum[g][r], (__m512bh)_mm512_load_si512(turned[g] + q * LANES),
                                           (__m512bh)_mm512_set1_epi32(int(a[r * a_step + p + q])));
      }
      for (int r = 0; r < ROWS; ++r)
        for (int64_t g = 0; g < GROUPS && at + g * LANES < weight.count; ++g)
          store_part(sum[g][r], bias, at + g * LANES, weight.count, c + r * stride);
    }
  });
}

bool multiply_few(const BFloat16* a, const BFloat16* b, const BFloat16* bias, BFloat16* c, const MatrixShape& s) {
  constexpr void (*BY_ROWS[])(const uint32_t*, int64_t, const Source&, const BFloat16*, BFloat16*, int64_t) = {
      few_rows<1>, few_rows<2>, few_rows<3>, few_rows<4>, few_rows<5>, few_rows<6>, few_rows<7>, few_rows<8>};
  if (s.rows > 8 || s.a_transposed || !s.b_transposed) return false;
  int64_t step = (s.depth + 2 * LANES - 1) / (2 * LANES) * LANES;
  uint32_t* rows = static_cast<uint32_t*>(scratch(3, size_t(s.rows * step + LANES) * 4));
  std::memset(rows, 0, size_t(s.rows * step) * 4);
  for (int64_t r = 0; r < s.rows; ++r) std::memcpy(rows + r * step, a + r * s.a_stride, size_t(s.depth) * 2);
  Source weight{b, s.b_stride, s.columns, s.depth, true};
  if (s.rows) BY_ROWS[s.rows - 1](rows, step, weight, bias, c, s.c_stride);
  return true;
}

}  // namespace

bool dots_pairs() {
#ifdef __AMX_BF16__
  if (amx_permitted()) return false;
#endif
  return true;
}

bool multiply_dot(const BFloat16* a, const BFloat16* b, const BFloat16* bias, BFloat16* c, const MatrixShape& s) {
  if (!dots_pairs()) return false;
  if (multiply_few(a, b, bias, c, s)) return true;
  Source rows{a, s.a_stride, s.rows, s.depth, !s.a_transposed}, columns{b, s.b_stride, s.columns, s.depth, s.b_transposed};
  bool turned = s.b_transposed;
  const Source &across = turned ? rows : columns, &spread = turned ? columns : rows;
  int64_t pairs = (s.depth + 1) / 2, vectors = (across.count + LANES - 1) / LANES, panels = (vectors + 2) / 3;
  int64_t strips = (spread.count + STRIP - 1) / STRIP, groups = (strips + STRIPS_PER_TASK - 1) / STRIPS_PER_TASK;
  bool in_place = spread.along && s.depth % 2 == 0 && spread.stride % 2 == 0;
  int64_t words = (vectors * LANES + (in_place ? 0 : strips * STRIP)) * pairs;
  uint32_t *lanes = static_cast<uint32_t*>(scratch(3, size_t(words) * 4)), *others = lanes + vectors * LANES * pairs;
  // Panels of equal width, as far as lanes allow: two of 32 rather than one of 48 and one of 16.
  auto begin = [&](int64_t panel) { return (vectors * panel + panels - 1) / panels * LANES; };
  auto width = [&](int64_t panel) { return begin(panel + 1) - begin(panel); };
  parallel(panels, [&](int64_t i) { pack(across, begin(i), width(i), lanes + begin(i) * pairs, width(i)); });
  if (!in_place)
    parallel(strips, [&](int64_t j) { pack(spread, j * STRIP, STRIP, others + j * STRIP * pairs, STRIP); });
  auto multiply_cut = [&](int64_t i, int64_t j, int64_t p, int64_t count, float* sums) {
    const uint32_t* from = others + (j * pairs + p) * STRIP;
    int64_t per_pair = STRIP, per_item = 1, items = std::min(STRIP, spread.count - j * STRIP);
    if (in_place) {
      from = reinterpret_cast<const uint32_t*>(spread.matrix + j * STRIP * spread.stride) + p;
      per_pair = 1, per_item = spread.stride / 2;
    }
    const uint32_t* panel = lanes + begin(i) * pairs + p * width(i);
    (width(i) == PANEL ? strip<3> : width(i) == 2 * LANES ? strip<2> : strip<1>)(from, per_pair, per_item, items, panel,
                                                                                count, p > 0, sums);
  };
  auto store_block = [&](int64_t i, int64_t j, const float* sums) {
    int64_t lane = begin(i), item = j * STRIP, height = std::min(width(i), across.count - lane);
    int64_t count = std::min(STRIP, spread.count - item);
    if (turned)
      store_turned(sums, bias ? bias + item : nullptr, c + lane * s.c_stride + item, s.c_stride, height, count);
    else
      store_rows(sums, bias ? bias + lane : nullptr, c + item * s.c_stride + lane, s.c_stride, count, height);
  };
  parallel((panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK * groups, [&](int64_t task) {
    int64_t i_first = task / groups * PANELS_PER_TASK, i_end = std::min(panels, i_first + PANELS_PER_TASK);
    int64_t j_first = task % groups * STRIPS_PER_TASK, j_end = std::min(strips, j_first + STRIPS_PER_TASK);
    float* sums = static_cast<float*>(scratch(1, size_t(PANELS_PER_TASK * STRIPS_PER_TASK * STRIP * PANEL) * 4));
    int64_t p = 0;
    do {  // once where there is no depth: the sums are zero
      for (int64_t j = j_first; j < j_end; ++j)
        for (int64_t i = i_first; i < i_end; ++i) {
          float* block = sums + (pairs > DEPTH_CUT ? (i - i_first) * STRIPS_PER_TASK + j - j_first : 0) * STRIP * PANEL;
          multiply_cut(i, j, p, std::min(DEPTH_CUT, pairs - p), block);
          if (p + DEPTH_CUT >= pairs) store_block(i, j, block);
        }
    } while ((p += DEPTH_CUT) < pairs);
  });
  return true;
}
#else
bool dots_pairs() { return false; }
bool multiply_dot(const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*, const MatrixShape&) { return false; }
#endif

}  // namespace liaoyuan

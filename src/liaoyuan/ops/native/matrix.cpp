// Products of bf16 matrices in AMX tiles, for any of the four storage orders.
//
// torch's product for a weight's gradient (a transposed) runs at a third of the speed of the others, and its bits
// depend on the number of rows; here both operands are packed into tiles first, and the order of summation is that
// of the depth alone. Few rows (decode) swap the roles, so that the weight's tiles are read where they lie.
#include <algorithm>

#include "tiles.h"

namespace liaoyuan {

#ifdef __AMX_BF16__
namespace {

constexpr int64_t DEPTH = Amx::DEPTH, TILE = Amx::TILE;
constexpr int64_t GROUP = 16;     // strips of 32 rows, or panels of 32 columns, that are worked on together
constexpr int64_t DEPTH_CUT = 16;  // tiles of the depth between two visits of a block: 512 elements stay in the caches
constexpr int64_t FEW_ROWS = 64;  // up to here the roles are swapped

int64_t tiles(int64_t depth) { return (depth + DEPTH - 1) / DEPTH; }
int64_t blocks(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

// 16 rows of up to 32 elements as they are stored, zeros past the ends.
void copy_tile(const BFloat16* from, int64_t stride, int64_t rows, int64_t count, BFloat16* to) {
  for (int64_t r = 0; r < 16; ++r) {
    BFloat16* row = to + r * DEPTH;
    if (r < rows && count >= DEPTH) {
      std::memcpy(row, from + r * stride, 64);
    } else {
      std::memset(row, 0, 64);
      if (r < rows && count > 0) std::memcpy(row, from + r * stride, size_t(count) * 2);
    }
  }
}

// Rows that shall run along the depth: 32 rows of 16 elements, each two rows side by side.
void pair_tile(const BFloat16* from, int64_t stride, int64_t rows, int64_t count, BFloat16* to) {
  alignas(64) BFloat16 padded[32 * 16];
  if (rows < 32 || count < 16) {
    std::memset(padded, 0, sizeof padded);
    for (int64_t r = 0; r < std::min<int64_t>(rows, 32) && count > 0; ++r)
      std::memcpy(padded + r * 16, from + r * stride, size_t(std::min<int64_t>(count, 16)) * 2);
    from = padded, stride = 16;
  }
  for (int64_t p = 0; p < 16; ++p) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * p * stride));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (2 * p + 1) * stride));
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_store_si512(to + p * DEPTH, _mm512_permutexvar_epi16(Amx::zip(), both));
  }
}

struct Source {  // op(matrix): `count` rows of `depth` elements; along: stored with the depth along its rows
  const BFloat16* matrix;
  int64_t stride, count, depth;
  bool along;
};

// Strips of 32 rows, over the depth's tiles k ... k_end, one strip every `step` words, as left operand or (turned)
// as right operand of the transpose: tile (m, k) at 2k + m. Strips are packed together since a row of the source
// that runs across them is one piece of memory.
void pack(const Source& s, bool turned, int64_t strip, int64_t strip_end, int64_t k, int64_t k_end, BFloat16* to,
          int64_t step) {
  alignas(64) BFloat16 tile[TILE];
  for (int64_t at_k = k; at_k < k_end; ++at_k)
    for (int64_t half = 2 * strip; half < 2 * strip_end; ++half) {
      BFloat16* place = to + (half / 2 - strip) * step + ((at_k - k) * 2 + half % 2) * TILE;
      BFloat16* first = s.along == turned ? tile : place;
      int64_t rows = s.count - half * 16, steps = s.depth - at_k * DEPTH;
      if (s.along)
        copy_tile(s.matrix + half * 16 * s.stride + at_k * DEPTH, s.stride, rows, steps, first);
      else
        pair_tile(s.matrix + at_k * DEPTH * s.stride + half * 16, s.stride, steps, rows, first);
      if (first == tile) transpose(tile, 64, place);
    }
}

void store_block(const float* block, int64_t from_stride, const BFloat16* bias, BFloat16* c, int64_t stride,
                 int64_t rows, int64_t columns) {
  if (columns >= BLOCK && !bias) {
    for (int64_t r = 0; r < std::min<int64_t>(rows, BLOCK); ++r) {
      const float* row = block + r * from_stride;
      __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(row + 16), _mm512_load_ps(row));
      std::memcpy(c + r * stride, &both, 64);
    }
    return;
  }
  for (int64_t n = 0; n < std::min<int64_t>(columns, BLOCK); n += 16) {
    Vec shift = bias ? load(bias + n, columns - n) : Vec{};
    for (int64_t r = 0; r < std::min<int64_t>(rows, BLOCK); ++r)
      store(c + r * stride + n, load(block + r * from_stride + n) + shift, columns - n);
  }
}

// The same of a block whose transpose is wanted: c [columns, rows].
void store_turned(const float* block, int64_t from_stride, BFloat16* c, int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) float tile[256];
  for (int64_t r = 0; r < std::min<int64_t>(rows, BLOCK); r += 16)
    for (int64_t n = 0; n < std::min<int64_t>(columns, BLOCK); n += 16) {
      transpose(block + r * from_stride + n, from_stride * 4, tile);
      for (int64_t i = n; i < std::min<int64_t>(columns, n + 16); ++i)
        store(c + i * stride + r, load(tile + (i - n) * 16), rows - r);
    }
}

// One task computes up to GROUP strips of rows, GROUP panels of columns at a time: what it reads and its sums stay in
// the second-level cache. The right operand is packed ahead for all; the left one by each task when it needs it.
void many_rows(const BFloat16* a, const BFloat16* b, const BFloat16* bias, BFloat16* c, const MatrixShape& s,
               bool turned = false) {
  int64_t depth = tiles(s.depth), panel = depth * 2 * TILE, panels = blocks(s.columns), strips = blocks(s.rows);
  Source left_source{a, s.a_stride, s.rows, s.depth, !s.a_transposed};
  Source right_source{b, s.b_stride, s.columns, s.depth, s.b_transposed};
  BFloat16* right = static_cast<BFloat16*>(scratch(3, size_t(panels * panel) * 2));
  int64_t cuts = (depth + DEPTH_CUT - 1) / DEPTH_CUT;
  parallel((panels + GROUP - 1) / GROUP * cuts, [&](int64_t task) {
    int64_t j = task / cuts * GROUP, k = task % cuts * DEPTH_CUT;
    pack(right_source, true, j, std::min(panels, j + GROUP), k, std::min(depth, k + DEPTH_CUT),
         right + j * panel + k * 2 * TILE, panel);
  });
  int64_t group = std::clamp<int64_t>(strips / 4, 1, GROUP);
  parallel((strips + group - 1) / group, [&](int64_t task) {
    constexpr int64_t STRIP = DEPTH_CUT * 2 * TILE;
    int64_t first = task * group, count = std::min(strips - first, group), width = cuts > 1 ? GROUP * BLOCK : BLOCK;
    BFloat16* left = static_cast<BFloat16*>(scratch(0, size_t(group * STRIP) * 2));
    float* sums = static_cast<float*>(scratch(1, size_t((cuts > 1 ? group : 1) * BLOCK * width) * sizeof(float)));
    Amx::begin();
    for (int64_t j_first = 0; j_first < panels; j_first += GROUP)
      for (int64_t k = 0; k < depth; k += DEPTH_CUT) {
        int64_t k_end = std::min(depth, k + DEPTH_CUT), j_end = std::min(panels, j_first + GROUP);
        if (cuts > 1 || j_first == 0) pack(left_source, false, first, first + count, k, k_end, left, STRIP);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = j_first; j < j_end; ++j) {
            float* block = cuts > 1 ? sums + i * BLOCK * width + (j - j_first) * BLOCK : sums;
            Amx::multiply<2>(block, width, k > 0, left + i * STRIP, 1, 2, right + j * panel + k * 2 * TILE, 1, 2,
                             k_end - k);
            if (k_end < depth) continue;
            if (turned)
              store_turned(block, width, c + j * BLOCK * s.c_stride + (first + i) * BLOCK, s.c_stride,
                           s.rows - (first + i) * BLOCK, s.columns - j * BLOCK);
            else
              store_block(block, width, bias ? bias + j * BLOCK : nullptr,
                          c + (first + i) * BLOCK * s.c_stride + j * BLOCK, s.c_stride,
                          s.rows - (first + i) * BLOCK, s.columns - j * BLOCK);
          }
      }
    Amx::end();
  });
}

// c^T = b^T a^T with b stored [columns, depth]: its tiles are loaded from where they are.
template <int COLUMNS>
void few_rows_block(const BFloat16* b, int64_t stride, const BFloat16* right, int64_t depth, float* block) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, b + k * DEPTH, stride * 2);
    _tile_loadd(6, right + 2 * k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, b + 16 * stride + k * DEPTH, stride * 2);
    _tile_dpbf16ps(1, 5, 6);
    if (COLUMNS == 2) {
      _tile_loadd(7, right + (2 * k + 1) * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, block, BLOCK * 4);
  _tile_stored(1, block + 16 * BLOCK, BLOCK * 4);
  if (COLUMNS == 2) {
    _tile_stored(2, block + 16, BLOCK * 4);
    _tile_stored(3, block + 16 * BLOCK + 16, BLOCK * 4);
  }
}

void few_rows(const BFloat16* a, const BFloat16* b, const BFloat16* bias, BFloat16* c, const MatrixShape& s) {
  int64_t depth = tiles(s.depth), strip = depth * 2 * TILE, panels = blocks(s.rows);
  BFloat16* right = static_cast<BFloat16*>(scratch(3, size_t(panels * strip) * 2));
  pack({a, s.a_stride, s.rows, s.depth, true}, true, 0, panels, 0, depth, right, strip);
  constexpr int64_t ROWS_PER_TASK = 128;
  parallel((s.columns + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](int64_t task) {
    alignas(64) float block[BLOCK * BLOCK], tile[256];
    Amx::begin();
    for (int64_t at = task * ROWS_PER_TASK; at < std::min(s.columns, (task + 1) * ROWS_PER_TASK); at += BLOCK) {
      const BFloat16* rows = b + at * s.b_stride;
      int64_t stride = s.b_stride;
      if (at + BLOCK > s.columns || s.depth % DEPTH) {  // a ragged end: through a padded copy
        BFloat16* copy = static_cast<BFloat16*>(scratch(0, size_t(strip) * 2));
        std::memset(copy, 0, size_t(strip) * 2);
        stride = depth * DEPTH;
        for (int64_t r = 0; r < std::min<int64_t>(BLOCK, s.columns - at); ++r)
          std::memcpy(copy + r * stride, rows + r * s.b_stride, size_t(s.depth) * 2);
        rows = copy;
      }
      for (int64_t j = 0; j < panels; ++j) {
        int64_t count = std::min<int64_t>(BLOCK, s.rows - j * BLOCK);
        if (count > 16)
          few_rows_block<2>(rows, stride, right + j * strip, depth, block);
        else
          few_rows_block<1>(rows, stride, right + j * strip, depth, block);
        for (int64_t o = 0; o < BLOCK && at + o < s.columns; o += 16)
          for (int64_t n = 0; n < count; n += 16) {
            transpose(block + o * BLOCK + n, BLOCK * 4, tile);
            Vec shift = bias ? load(bias + at + o, s.columns - at - o) : Vec{};
            for (int64_t r = n; r < std::min(count, n + 16); ++r)
              store(c + (j * BLOCK + r) * s.c_stride + at + o, load(tile + (r - n) * 16) + shift, s.columns - at - o);
          }
      }
    }
    Amx::end();
  });
}

}  // namespace
#endif

bool multiply(const BFloat16* a, const BFloat16* b, const BFloat16* bias, BFloat16* c, MatrixShape shape) {
#ifdef __AMX_BF16__
  if (!amx_permitted()) return false;
  if (shape.rows == 0 || shape.columns == 0) return true;
  if (shape.rows <= FEW_ROWS && !shape.a_transposed && shape.b_transposed)
    few_rows(a, b, bias, c, shape);
  else if (shape.a_transposed && !bias && shape.columns > shape.rows)  // the larger operand is packed by the tasks
    many_rows(b, a, nullptr, c,
              {shape.columns, shape.rows, shape.depth, !shape.b_transposed, !shape.a_transposed, shape.b_stride,
               shape.a_stride, shape.c_stride},
              true);
  else
    many_rows(a, b, bias, c, shape);
  return true;
#else
  return false;
#endif
}

bool bf16_is_slow() {
#if defined(__x86_64__) && !defined(__AVX512BW__)
  return true;
#else
  return false;
#endif
}

}  // namespace liaoyuan

// Matrix products of small packed tiles: the inner engine of attention. Three engines with one interface: Amx
// multiplies bf16 in Intel's tile registers, Dot bf16 in AVX-512's dot products of pairs, Wide fp32 in vector
// registers of any machine.
//
// A tile is 1 KiB: 16 rows of 64 bytes, DEPTH words each along the reduced dimension.
//   left operand  [16 rows, DEPTH]: the rows as they are
//   right operand [DEPTH, 16 columns]: Wide, row by row; others, in pairs (rows 2p and 2p + 1 of a column side by side)
// So for any matrix X with tiles as left operand: right(X^T) is each tile transposed as 16 x 16 words of 32 bits,
// and left(X^T) is the same of right(X). Each element of a product is summed along the reduced dimension in an
// order that depends on nothing else: this makes a row's result independent of the rows computed beside it.
#pragma once
#include <type_traits>

#include "amx.h"
#include "kernels.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace liaoyuan {

constexpr int BLOCK = 32;  // rows and columns of one product: two tiles each way

struct Wide {
  using Word = float;
  static constexpr int DEPTH = 16, TILE = 256;
  static void begin() {}
  static void end() {}

  // Tile (k, n) of right(X), from left(X) that is `depth` tiles wide.
  static void right_tile(const float* left, int64_t depth, int64_t k, int64_t n, float* to) {
    std::memcpy(to, left + (k * depth + n) * TILE, TILE * sizeof(float));
  }

  // Row r of a 32 x 32 block as left operand, its two left tiles each way at (k * 2 + m).
  static void put_left(float* block, int r, Vec first, Vec second) {
    store(block + (r / 16) * TILE + (r % 16) * 16, first);
    store(block + (2 + r / 16) * TILE + (r % 16) * 16, second);
  }
  // Rows r and r + 1 of a 32 x 32 block as right operand, its tiles at (k * 2 + n).
  static void put_right(float* block, int r, Vec first, Vec second, Vec next_first, Vec next_second) {
    float* to = block + (r / 16) * 2 * TILE + (r % 16) * 16;
    store(to, first);
    store(to + TILE, second);
    store(to + 16, next_first);
    store(to + TILE + 16, next_second);
  }

  // c [32, 16 * COLUMNS] (+)= sum over k of left(m, k) right(k, n); strides count tiles.
  template <int COLUMNS>
  static void multiply(float* c, int64_t ldc, bool add, const float* left, int64_t left_m, int64_t left_k,
                       const float* right, int64_t right_n, int64_t right_k, int64_t depth) {
    constexpr int STEP = REGISTERS == 1 ? COLUMNS : 1;
    for (int r = 0; r < BLOCK; r += ROWS)
      for (int n = 0; n < COLUMNS; n += STEP)
        few_rows<STEP>(c + r * ldc + n * 16, ldc, add, left + (r / 16) * left_m * TILE + (r % 16) * 16, left_k,
                       right + n * right_n * TILE, right_n, right_k, depth);
  }

 private:
  static constexpr int REGISTERS = sizeof(Vec) / sizeof(Register), WIDTH = 16 / REGISTERS;
  static constexpr int ROWS = 8 / REGISTERS;  // so that the sums stay in registers: there are 32 of 64 bytes, else 16

  // Not inlined: among other code the compiler moves the sums from register to register.
  template <int COLUMNS>
  [[gnu::noinline]] static void few_rows(float* c, int64_t ldc, bool add, const float* left, int64_t left_k,
                                         const float* right, int64_t right_n, int64_t right_k, int64_t depth) {
    constexpr int PARTS = COLUMNS * REGISTERS;
    auto cell = [&](int i, int n) { return c + i * ldc + n * WIDTH; };
    Register sums[ROWS][PARTS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < PARTS; ++n)
        if (add)
          std::memcpy(&sums[i][n], cell(i, n), sizeof(Register));
        else
          sums[i][n] = Register{};
    for (int64_t k = 0; k < depth; ++k) {
      const float *a = left + k * left_k * TILE, *b = right + k * right_k * TILE;
      for (int d = 0; d < 16; ++d) {
        Register columns[PARTS];
#pragma GCC unroll 4
        for (int n = 0; n < PARTS; ++n) {
          std::memcpy(&columns[n], b + n / REGISTERS * right_n * TILE + d * 16 + n % REGISTERS * WIDTH, sizeof(Register));
          hold(columns[n]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
          for (int n = 0; n < PARTS; ++n) sums[i][n] += a[i * 16 + d] * columns[n];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < PARTS; ++n) std::memcpy(cell(i, n), &sums[i][n], sizeof(Register));
  }
};

#ifdef __AVX512BF16__
struct Pairs {  // how both engines of bf16 pack
  using Word = BFloat16;
  static constexpr int DEPTH = 32, TILE = 512;

  static void right_tile(const BFloat16* left, int64_t depth, int64_t k, int64_t n, BFloat16* to) {
    for (int p = 0; p < 16; ++p) {
      int r = 2 * p;
      const BFloat16* from = left + ((2 * k + r / 16) * depth + n / 2) * TILE + (r % 16) * DEPTH + (n % 2) * 16;
      WordVec words = ((WordVec)load(from) >> 16) | (WordVec)load(from + DEPTH);
      std::memcpy(to + p * DEPTH, &words, sizeof words);
    }
  }
  // 32 elements in their order, as 16 pairs.
  static WordVec narrow(Vec first, Vec second) { return (WordVec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
  static void put_left(BFloat16* block, int r, Vec first, Vec second) {
    WordVec row = narrow(first, second);
    std::memcpy(block + (r / 16) * TILE + (r % 16) * DEPTH, &row, sizeof row);
  }
  static __m512i zip() {  // the order that puts the elements of two halves side by side
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                            19, 3, 18, 2, 17, 1, 16, 0);
  }
  static WordVec pair(Vec low, Vec high) {
    return (WordVec)_mm512_permutexvar_epi16(zip(), (__m512i)narrow(low, high));
  }
  static void put_right(BFloat16* block, int r, Vec first, Vec second, Vec next_first, Vec next_second) {
    WordVec left = pair(first, next_first), right = pair(second, next_second);
    std::memcpy(block + (r / 2) * DEPTH, &left, sizeof left);
    std::memcpy(block + TILE + (r / 2) * DEPTH, &right, sizeof right);
  }
};

struct Dot : Pairs {
  static void begin() {}
  static void end() {}

  // sums + the pairs' products, rounded as the instruction does: decode uses it too, or its bits would be others.
  static Vec dot(Vec sums, WordVec left, WordVec right) {
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
  }
  static WordVec spread(const BFloat16* pair) {
    uint32_t word;
    std::memcpy(&word, pair, sizeof word);
    return word - WordVec{};
  }

  template <int COLUMNS>
  static void multiply(float* c, int64_t ldc, bool add, const BFloat16* left, int64_t left_m, int64_t left_k,
                       const BFloat16* right, int64_t right_n, int64_t right_k, int64_t depth) {
    for (int r = 0; r < BLOCK; r += ROWS)
      few_rows<COLUMNS>(c + r * ldc, ldc, add, left + (r / 16) * left_m * TILE + (r % 16) * DEPTH, left_k, right,
                        right_n, right_k, depth);
  }

 private:
  static constexpr int ROWS = 8;  // so that the sums stay in registers

  template <int COLUMNS>
  [[gnu::noinline]] static void few_rows(float* c, int64_t ldc, bool add, const BFloat16* left, int64_t left_k,
                                         const BFloat16* right, int64_t right_n, int64_t right_k, int64_t depth) {
    Vec sums[ROWS][COLUMNS] = {};
    if (add) {
      const float* row = c;
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i, row += ldc)
#pragma GCC unroll 2
        for (int n = 0; n < COLUMNS; ++n) sums[i][n] = load(row + n * 16);
    }
    for (; depth; --depth, left += left_k * TILE, right += right_k * TILE) {
      const BFloat16 *a = left, *b = right;
      for (int d = 0; d < DEPTH; d += 2, a += 2, b += DEPTH) {
        WordVec columns[COLUMNS];
#pragma GCC unroll 2
        for (int n = 0; n < COLUMNS; ++n) read(b + n * right_n * TILE, columns[n]);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
          for (int n = 0; n < COLUMNS; ++n) sums[i][n] = dot(sums[i][n], spread(a + i * DEPTH), columns[n]);
      }
    }
    asm("" : "+r"(c));  // addresses are made anew, not kept in registers through the loop
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i, c += ldc)
#pragma GCC unroll 2
      for (int n = 0; n < COLUMNS; ++n) store(c + n * 16, sums[i][n]);
  }
};
#endif

#if defined(HAS_AMX) && defined(__AVX512BF16__)
struct Amx : Pairs, Tiles {
  template <int COLUMNS>
  static void multiply(float* c, int64_t ldc, bool add, const BFloat16* left, int64_t left_m, int64_t left_k,
                       const BFloat16* right, int64_t right_n, int64_t right_k, int64_t depth) {
    written();
    float *c0 = c, *c1 = c + 16 * ldc;
    if (add) {
      _tile_loadd(0, c0, ldc * 4);
      _tile_loadd(1, c1, ldc * 4);
      if (COLUMNS == 2) {
        _tile_loadd(2, c0 + 16, ldc * 4);
        _tile_loadd(3, c1 + 16, ldc * 4);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if (COLUMNS == 2) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      const BFloat16 *a = left + k * left_k * TILE, *b = right + k * right_k * TILE;
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + left_m * TILE, 64);
      _tile_dpbf16ps(1, 5, 6);
      if (COLUMNS == 2) {
        _tile_loadd(7, b + right_n * TILE, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c0, ldc * 4);
    _tile_stored(1, c1, ldc * 4);
    if (COLUMNS == 2) {
      _tile_stored(2, c0 + 16, ldc * 4);
      _tile_stored(3, c1 + 16, ldc * 4);
    }
  }
};
#endif

// Call body with the best engine for bf16 here.
template <class Body>
void with_bf16_engine(const Body& body) {
#if defined(HAS_AMX) && defined(__AVX512BF16__)
  if (amx_permitted()) return body(Amx{});
#endif
#ifdef __AVX512BF16__
  body(Dot{});
#else
  body(Wide{});
#endif
}

// Sizes of the packed operands of one head dimension.
template <class E>
struct Packing {
  int64_t dim, depth, columns;  // depth: tiles along a reduced head dimension; columns: tiles of 16 along a kept one
  explicit Packing(int64_t dim)
      : dim(dim), depth((dim + BLOCK - 1) / BLOCK * BLOCK / E::DEPTH), columns((dim + BLOCK - 1) / BLOCK * 2) {}
  int64_t words(int64_t rows) const { return (rows + BLOCK - 1) / BLOCK * BLOCK * columns * 16; }

  // left(X) of 32 rows; row(i) is a pointer, or null for a row of zeros.
  template <class Row>
  void left(const Row& row, typename E::Word* to) const {
    using Word = typename E::Word;
    const int64_t tiles = depth, width = dim;  // local, so that stores do not make the compiler read them again
    for (int i = 0; i < BLOCK; ++i) {
      const auto* from = row(i);
      Word* cell = to + (i / 16 * tiles * E::TILE) + i % 16 * E::DEPTH;
      for (int64_t at = 0; at < tiles * E::DEPTH; at += E::DEPTH, cell += E::TILE)
        if (!from)
          std::memset(cell, 0, 64);
        else if (std::is_same_v<decltype(from), const Word*> && width - at >= E::DEPTH)
          std::memcpy(cell, from + at, 64);
        else
          for (int64_t d = 0; d < E::DEPTH; d += 16)
            store(cell + d, at + d < width ? load(from + at + d, width - at - d) : Vec{});
    }
  }
  // right(X^T) of the same 32 rows: tile (k, n) at n * depth + k.
  void right_transposed(const typename E::Word* left, typename E::Word* to) const {
    for (int64_t i = 0; i < 2 * depth; ++i) transpose(left + i * E::TILE, 64, to + i * E::TILE);
  }
  // right(X) of the same 32 rows: tile (k, n) at k * columns + n.
  void right(const typename E::Word* left, typename E::Word* to) const {
    for (int64_t k = 0; k < BLOCK / E::DEPTH; ++k)
      for (int64_t n = 0; n < columns; ++n) E::right_tile(left, depth, k, n, to + (k * columns + n) * E::TILE);
  }
  // left(X^T) of the same 32 rows: tile (m, k) at k * columns + m.
  void left_transposed(const typename E::Word* left, typename E::Word* to) const {
    for (int64_t k = 0; k < BLOCK / E::DEPTH; ++k)
      for (int64_t m = 0; m < columns; ++m) {
        alignas(64) typename E::Word tile[E::TILE];
        E::right_tile(left, depth, k, m, tile);
        transpose(tile, 64, to + (k * columns + m) * E::TILE);
      }
  }
};

}  // namespace liaoyuan

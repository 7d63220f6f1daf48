// Groups of rows, each multiplied with the matrix of its own expert; forward and backward.
//
// All three products are made of one: both operands are brought into words along the reduced dimension (one fp32
// value, or a pair of bf16 values where the machine multiplies pairs), the right one in blocks of 16 columns. Each
// element is summed step by step along the reduced dimension, whatever the number of rows: this makes a row's result
// independent of its group. torch's product would keep a compiled kernel for each number of rows that it has seen.
#include <algorithm>
#include <vector>

#include "kernels.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace liaoyuan {

namespace {

constexpr int64_t PANEL = 64;  // columns that a task works on: a panel of the usual depths fits the L2 cache
// Up to FEW rows cost less than the reading of their matrix, which is then read row by row: so many columns of it in a
// task, so many steps at a time.
constexpr int64_t FEW = 24, WIDE = 1024, CUT = 8;
constexpr int64_t SMALL = 1 << 17;  // bytes of a right operand that may be read anew for each tile of rows

template <class T>
struct Engine {
  using Word = float;
  static constexpr int64_t VALUES = 1;  // of the reduced dimension in a word
  static void add_product(Register& sum, float left, Register right) { sum += left * right; }
  // Words along a row, zeros past its end.
  static Vec words(const T* from, int64_t count) { return load(from, count); }
  // Words down the columns of one row, or of a pair of rows (`next` may be null): BLOCKS blocks of 16.
  static constexpr int64_t BLOCKS = 1;
  static void down(const T* from, const T*, int64_t count, Word* to, int64_t) { write(to, load(from, count)); }
};

#ifdef __AVX512BF16__
template <>
struct Engine<BFloat16> {
  using Word = uint32_t;
  static constexpr int64_t VALUES = 2;
  static void add_product(Register& sum, uint32_t left, Register right) {
    sum = (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
  }
  static Vec words(const BFloat16* from, int64_t count) {
    Vec result{};
    std::memcpy(&result, from, size_t(std::min<int64_t>(count, 2 * LANES)) * sizeof(BFloat16));
    return result;
  }
  static constexpr int64_t BLOCKS = 2;
  static void down(const BFloat16* from, const BFloat16* next, int64_t count, Word* to, int64_t block_stride) {
    auto row = [&](const BFloat16* values) {
      if (count >= 2 * LANES) return _mm512_loadu_si512(values);
      return _mm512_maskz_loadu_epi16(__mmask32((uint32_t(1) << count) - 1), values);
    };
    __m512i first = row(from), second = next ? row(next) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, order(0), second));
    if (count > LANES) _mm512_storeu_si512(to + block_stride, _mm512_permutex2var_epi16(first, order(LANES), second));
  }

 private:
  static __m512i order(int from) {  // elements `from`, `from` + 1, ... of two rows side by side
    alignas(64) uint16_t places[2 * LANES];
    for (int i = 0; i < LANES; ++i) places[2 * i] = uint16_t(from + i), places[2 * i + 1] = uint16_t(2 * LANES + from + i);
    return _mm512_load_si512(places);
  }
};
#endif

template <class T>
using Word = typename Engine<T>::Word;
template <class T>
int64_t steps_of(int64_t depth) { return (depth + Engine<T>::VALUES - 1) / Engine<T>::VALUES; }
int64_t blocks_of(int64_t columns) { return (columns + LANES - 1) / LANES; }

template <class T>
struct Left {  // rows of words
  const Word<T>* words;
  int64_t stride;
  Left from(int64_t row) const { return {words + row * stride, stride}; }
};
template <class T>
struct Right {  // block b of 16 columns: [steps, 16] at words + b * block_stride
  const Word<T>* words;
  int64_t block_stride;
};

constexpr int REGISTERS = sizeof(Vec) / sizeof(Register), WIDTH = LANES / REGISTERS;
constexpr int ROWS = REGISTERS == 4 ? 4 : 6;  // so that the sums stay in registers: there are 32 of 64 bytes, else 16

// Rows of fp32 sums; with `add` a product goes on where an earlier part of the reduced dimension ended.
struct Sums {
  float* data;
  int64_t stride;
  bool add;
};

template <class T, int COUNT, int PARTS>
void tile(Left<T> left, Right<T> right, int64_t steps, Sums to) {
  Register sums[COUNT][PARTS] = {};
#pragma GCC unroll 6
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < PARTS; ++n)
      if (to.add) std::memcpy(&sums[i][n], to.data + i * to.stride + n * WIDTH, sizeof(Register));
  for (int64_t step = 0; step < steps; ++step) {
    Register columns[PARTS];
#pragma GCC unroll 4
    for (int n = 0; n < PARTS; ++n) {
      std::memcpy(&columns[n], right.words + n / REGISTERS * right.block_stride + step * LANES + n % REGISTERS * WIDTH,
                  sizeof(Register));
      hold(columns[n]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < COUNT; ++i) {
      Word<T> word;
      std::memcpy(&word, left.words + i * left.stride + step, sizeof word);
#pragma GCC unroll 4
      for (int n = 0; n < PARTS; ++n) Engine<T>::add_product(sums[i][n], word, columns[n]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < PARTS; ++n) std::memcpy(to.data + i * to.stride + n * WIDTH, &sums[i][n], sizeof(Register));
}

// Up to ROWS rows of a panel.
template <class T, int COUNT = ROWS>
void tiles_of_panel(int64_t rows, Left<T> left, Right<T> right, int64_t columns, int64_t steps, Sums sums) {
  if constexpr (COUNT > 1)
    if (rows < COUNT) return tiles_of_panel<T, COUNT - 1>(rows, left, right, columns, steps, sums);
  auto from = [&](int64_t at) { return Right<T>{right.words + at / LANES * right.block_stride, right.block_stride}; };
  auto to = [&](int64_t at) { return Sums{sums.data + at, sums.stride, sums.add}; };
  int64_t at = 0;
  if constexpr (REGISTERS == 1)
    for (; at + 3 * LANES < columns; at += 4 * LANES) tile<T, COUNT, 4>(left, from(at), steps, to(at));
  for (; at < columns; at += LANES) tile<T, COUNT, REGISTERS>(left, from(at), steps, to(at));
}

template <class T>
void store_sums(Sums sums, int64_t rows, int64_t columns, const T* bias, T* out, int64_t stride) {
  for (int64_t at = 0; at < columns; at += LANES) {
    Vec shift = bias ? load(bias + at, columns - at) : Vec{};
    for (int64_t i = 0; i < rows; ++i)
      store(out + i * stride + at, load(sums.data + i * sums.stride + at) + shift, columns - at);
  }
}

// out [rows, columns] = left right (+ bias), columns <= PANEL.
template <class T>
void multiply_panel(Left<T> left, int64_t rows, Right<T> right, int64_t columns, int64_t steps, const T* bias, T* out,
                    int64_t stride) {
  alignas(64) float block[ROWS * PANEL];
  Sums sums{block, PANEL, false};
  for (int64_t row = 0; row < rows; row += ROWS) {
    int64_t count = std::min<int64_t>(ROWS, rows - row);
    tiles_of_panel<T>(count, left.from(row), right, columns, steps, sums);
    store_sums(sums, count, columns, bias, out + row * stride, stride);
  }
}

// Rows of `depth` values become columns: their words run down a block. Steps are padded to whole tiles.
template <class T>
void pack_rows(const T* from, int64_t rows, int64_t depth, Word<T>* to, int64_t block_stride) {
  constexpr int64_t STEP = LANES * Engine<T>::VALUES;
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t at = 0; at < depth; at += STEP) {
      Word<T>* block = to + row / LANES * block_stride + at / Engine<T>::VALUES * LANES;
      const T* corner = from + row * depth + at;
      if (sizeof(T) * Engine<T>::VALUES == 4 && rows - row >= LANES && depth - at >= STEP) {
        transpose(corner, depth * int64_t(sizeof(T)), block);
        continue;
      }
      alignas(64) float padded[LANES * LANES] = {};
      for (int64_t i = 0; i < std::min<int64_t>(LANES, rows - row); ++i)
        store(padded + i * LANES, Engine<T>::words(corner + i * depth, depth - at));
      transpose(padded, LANES * 4, block);
    }
}

// Columns of a matrix of `depth` rows: words are taken down the rows.
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t depth, int64_t columns, Word<T>* to, int64_t block_stride) {
  for (int64_t step = 0; step < steps_of<T>(depth); ++step) {
    const T* row = from + step * Engine<T>::VALUES * stride;
    const T* next = step * Engine<T>::VALUES + 1 < depth ? row + stride : nullptr;
    for (int64_t at = 0; at < columns; at += LANES * Engine<T>::BLOCKS)
      Engine<T>::down(row + at, next ? next + at : nullptr, columns - at,
                      to + at / LANES * block_stride + step * LANES, block_stride);
  }
}

// Rows as left operand: where they lie if their words can be read there, else a copy in `space`.
template <class T>
Left<T> left_rows(const T* rows, int64_t count, int64_t depth, void* space) {
  int64_t steps = steps_of<T>(depth), padded = blocks_of(steps) * LANES;
  if (sizeof(T) * Engine<T>::VALUES == 4 && depth % Engine<T>::VALUES == 0)
    return {reinterpret_cast<const Word<T>*>(rows), steps};
  constexpr int64_t STEP = LANES * Engine<T>::VALUES;
  Word<T>* copy = static_cast<Word<T>*>(space);
  parallel(blocks_of(count), [&](int64_t task) {
    for (int64_t row = task * LANES; row < std::min(count, (task + 1) * LANES); ++row)
      for (int64_t at = 0; at < depth; at += STEP)
        write(copy + row * padded + at / Engine<T>::VALUES, Engine<T>::words(rows + row * depth + at, depth - at));
  });
  return {copy, padded};
}

// Call body(expert, first column) for all panels of the experts that have rows.
template <class Body>
void over_panels(const Groups& groups, int64_t columns, int64_t width, const Body& body) {
  int64_t panels = (columns + width - 1) / width;
  parallel(groups.experts * panels, [&](int64_t task) {
    int64_t expert = task / panels;
    if (groups.starts[expert + 1] > groups.starts[expert]) body(expert, task % panels * width);
  });
}

// out = left times a matrix [depth, columns], whose rows are read one after the other.
template <class T>
void multiply_few(Left<T> left, int64_t rows, const T* matrix, int64_t stride, int64_t depth, int64_t columns, T* out) {
  alignas(64) float sums[FEW * WIDE];
  alignas(64) Word<T> panel[CUT * WIDE];
  for (int64_t step = 0; step == 0 || step * Engine<T>::VALUES < depth; step += CUT) {
    int64_t part = std::min(depth - step * Engine<T>::VALUES, CUT * Engine<T>::VALUES);
    pack_columns(matrix + step * Engine<T>::VALUES * stride, stride, part, columns, panel, CUT * LANES);
    for (int64_t row = 0; row < rows; row += ROWS)
      tiles_of_panel<T>(std::min<int64_t>(ROWS, rows - row), {left.words + row * left.stride + step, left.stride},
                        {panel, CUT * LANES}, columns, steps_of<T>(part), {sums + row * WIDE, WIDE, step > 0});
  }
  store_sums<T>({sums, WIDE, false}, rows, columns, nullptr, out, stride);
}

template <class T>
Word<T>* panel_space(int64_t steps) {
  return static_cast<Word<T>*>(scratch(0, size_t(blocks_of(steps) * LANES * PANEL) * sizeof(Word<T>)));
}

}  // namespace

template <class T>
int64_t grouped_space(int64_t rows, int64_t depth) {
  bool in_place = sizeof(T) * Engine<T>::VALUES == 4 && depth % Engine<T>::VALUES == 0;
  return in_place ? 0 : rows * blocks_of(steps_of<T>(depth)) * LANES * 4;
}

template <class T>
void grouped_linear(const T* x, const T* weight, const T* bias, T* out, void* space, const Groups& groups,
                    int64_t inner, int64_t outer) {
  Left<T> left = left_rows(x, groups.starts[groups.experts], inner, space);
  int64_t steps = steps_of<T>(inner), block = blocks_of(steps) * LANES * LANES;
  over_panels(groups, outer, PANEL, [&](int64_t expert, int64_t first) {
    int64_t columns = std::min(PANEL, outer - first), row = groups.starts[expert];
    Word<T>* panel = panel_space<T>(steps);
    pack_rows(weight + (expert * outer + first) * inner, columns, inner, panel, block);
    multiply_panel<T>(left.from(row), groups.starts[expert + 1] - row, {panel, block}, columns, steps,
                      bias ? bias + expert * outer + first : nullptr, out + row * outer + first, outer);
  });
}

template <class T>
void grouped_linear_input(const T* grad, const T* weight, T* grad_x, void* space, const Groups& groups, int64_t inner,
                          int64_t outer) {
  Left<T> left = left_rows(grad, groups.starts[groups.experts], outer, space);
  int64_t steps = steps_of<T>(outer), block = steps * LANES;
  over_panels(groups, inner, WIDE, [&](int64_t expert, int64_t begin) {
    int64_t end = std::min(inner, begin + WIDE), row = groups.starts[expert], rows = groups.starts[expert + 1] - row;
    const T* own = weight + expert * outer * inner;
    if (rows <= FEW)
      return multiply_few(left.from(row), rows, own + begin, inner, outer, end - begin, grad_x + row * inner + begin);
    for (int64_t at = begin; at < end; at += PANEL) {
      int64_t columns = std::min(PANEL, end - at);
      Word<T>* panel = panel_space<T>(steps);
      pack_columns(own + at, inner, outer, columns, panel, block);
      multiply_panel<T>(left.from(row), rows, {panel, block}, columns, steps, nullptr, grad_x + row * inner + at, inner);
    }
  });
}

namespace {

// Columns as left operand: row i of it has the words of column i, in `to` at i * (padded steps).
template <class T>
Left<T> left_columns(const T* from, int64_t stride, int64_t depth, int64_t columns, Word<T>* to) {
  int64_t steps = steps_of<T>(depth), padded = blocks_of(steps) * LANES, block = padded * LANES;
  Word<T>* turned = to + PANEL * padded;
  pack_columns(from, stride, depth, columns, turned, block);
  for (int64_t at = 0; at < columns; at += LANES)
    for (int64_t step = 0; step < steps; step += LANES) {
      alignas(64) Word<T> corner[LANES * LANES];
      transpose(turned + at / LANES * block + step * LANES, LANES * 4, corner);
      for (int64_t i = 0; i < LANES; ++i) std::memcpy(to + (at + i) * padded + step, corner + i * LANES, LANES * 4);
    }
  return {to, padded};
}

// Each group's rows as right operand, their words down the columns; group after group.
template <class T>
struct PackedGroups {
  Word<T>* words;
  int64_t blocks;  // of 16 columns
  std::vector<int64_t> step_starts;

  PackedGroups(Word<T>* words, int64_t columns, const Groups& groups)
      : words(words), blocks(blocks_of(columns)), step_starts(size_t(groups.experts) + 1, 0) {
    for (int64_t e = 0; e < groups.experts; ++e)
      step_starts[e + 1] = step_starts[e] + steps_of<T>(groups.starts[e + 1] - groups.starts[e]);
  }
  int64_t steps(int64_t expert) const { return step_starts[expert + 1] - step_starts[expert]; }
  Word<T>* at(int64_t expert, int64_t column) const {
    return words + (step_starts[expert] * blocks + column / LANES * steps(expert)) * LANES;
  }
};

template <class T>
PackedGroups<T> pack_groups(const T* rows, void* space, const Groups& groups, int64_t columns) {
  PackedGroups<T> packed(static_cast<Word<T>*>(space), columns, groups);
  over_panels(groups, columns, PANEL, [&](int64_t expert, int64_t first) {
    int64_t begin = groups.starts[expert], depth = groups.starts[expert + 1] - begin;
    pack_columns(rows + begin * columns + first, columns, depth, std::min(PANEL, columns - first),
                 packed.at(expert, first), packed.steps(expert) * LANES);
  });
  return packed;
}

}  // namespace

template <class T>
int64_t grouped_weight_space(const Groups& groups, int64_t inner) {
  PackedGroups<T> packed(nullptr, inner, groups);
  return packed.step_starts.back() * packed.blocks * LANES * int64_t(sizeof(Word<T>));
}

template <class T>
void grouped_linear_weight(const T* grad, const T* x, T* grad_weight, void* space, const Groups& groups, int64_t inner,
                           int64_t outer) {
  PackedGroups<T> right = pack_groups(x, space, groups, inner);
  int64_t panels = (outer + PANEL - 1) / PANEL;
  parallel(groups.experts * panels, [&](int64_t task) {
    int64_t expert = task / panels, first = task % panels * PANEL, count = std::min(PANEL, outer - first);
    int64_t begin = groups.starts[expert], depth = groups.starts[expert + 1] - begin, steps = right.steps(expert);
    T* to = grad_weight + (expert * outer + first) * inner;
    if (!depth) return (void)std::memset(to, 0, size_t(count * inner) * sizeof(T));
    Word<T>* own = panel_space<T>(2 * (steps + LANES));
    Left<T> left = left_columns(grad + begin * outer + first, outer, depth, count, own);
    // Few rows: what is written counts, so whole rows of it; else what is read, so a panel of it for all rows.
    int64_t rows = steps * inner * int64_t(sizeof(Word<T>)) <= SMALL ? ROWS : PANEL;
    for (int64_t row = 0; row < count; row += rows)
      for (int64_t at = 0; at < inner; at += PANEL)
        multiply_panel<T>(left.from(row), std::min(rows, count - row), {right.at(expert, at), steps * LANES},
                          std::min(PANEL, inner - at), steps, nullptr, to + row * inner + at, inner);
  });
}

template <class T>
void grouped_sum(const T* rows, T* sums, const Groups& groups, int64_t columns) {
  parallel(groups.experts, [&](int64_t expert) {
    for (int64_t at = 0; at < columns; at += LANES) {
      Vec total{};
      for (int64_t row = groups.starts[expert]; row < groups.starts[expert + 1]; ++row)
        total += load(rows + row * columns + at, columns - at);
      store(sums + expert * columns + at, total, columns - at);
    }
  });
}

#define INSTANTIATE(T)                                                                                             \
  template int64_t grouped_space<T>(int64_t, int64_t);                                                              \
  template int64_t grouped_weight_space<T>(const Groups&, int64_t);                                                 \
  template void grouped_linear<T>(const T*, const T*, const T*, T*, void*, const Groups&, int64_t, int64_t);         \
  template void grouped_linear_input<T>(const T*, const T*, T*, void*, const Groups&, int64_t, int64_t);             \
  template void grouped_linear_weight<T>(const T*, const T*, T*, void*, const Groups&, int64_t, int64_t);            \
  template void grouped_sum<T>(const T*, T*, const Groups&, int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

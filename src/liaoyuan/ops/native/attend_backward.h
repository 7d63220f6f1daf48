// Attention backward (Dao 2023, arXiv 2307.08691, sec. 3.1.2) of one sequence and key head, whatever a query sees.
//
// As in the forward pass, blocks are transposed ([keys, rows]) and the query heads that share a key head are rows
// of one matrix. For a strip of rows, and each block of keys that any of them sees:
//   P^T = exp(scale K Q^T - lse)      dS^T = P^T (V dO^T - delta) scale        delta = rowsum(dO * O)
//   dV += P^T dO      dK += dS^T Q      dQ^T += K^T dS^T (for several key blocks at once)
#pragma once
#include "ranges.h"

namespace liaoyuan {

constexpr int64_t STRIP = 512 / BLOCK;  // row blocks handled together
constexpr int64_t KEY_GROUP = 4;        // key blocks between two additions to dQ

template <class E>
struct BackwardWorkspace {
  using Word = typename E::Word;
  int64_t base;                                                                             // first packed key
  Word *key, *key_transposed, *value, *query, *query_transposed, *grad, *grad_transposed;  // packed operands
  Word *weights, *score_grad, *score_grad_group;                                            // one strip
  Word* left;                                                                               // one block
  float *scores, *weight_grad, *delta, *lse, *grad_key, *grad_value, *grad_query;
  BlockRanges seen[STRIP];

  BackwardWorkspace(const Packing<E>& keys, const Packing<E>& values, Range range) : base(range.first / BLOCK * BLOCK) {
    int64_t count = range.last - base, key_words = keys.words(count), value_words = values.words(count);
    int64_t key_strip = STRIP * keys.words(BLOCK), value_strip = STRIP * values.words(BLOCK), square = BLOCK * BLOCK;
    int64_t block = std::max(keys.words(BLOCK), values.words(BLOCK));
    int64_t words = 2 * (key_words + key_strip + value_strip) + value_words + (2 + KEY_GROUP) * STRIP * square + block;
    Word* word = static_cast<Word*>(scratch(0, size_t(words) * sizeof(Word)));
    auto take = [](auto*& from, int64_t size) { return (from += size) - size; };
    key = take(word, key_words), key_transposed = take(word, key_words), value = take(word, value_words);
    query = take(word, key_strip), query_transposed = take(word, key_strip);
    grad = take(word, value_strip), grad_transposed = take(word, value_strip);
    weights = take(word, STRIP * square), score_grad = take(word, STRIP * square);
    score_grad_group = take(word, KEY_GROUP * STRIP * square);
    left = take(word, block);
    float* real = static_cast<float*>(scratch(
        1, size_t(2 * square + 2 * STRIP * BLOCK + key_words + value_words + key_strip) * sizeof(float)));
    scores = take(real, square), weight_grad = take(real, square);
    delta = take(real, STRIP * BLOCK), lse = take(real, STRIP * BLOCK);
    grad_key = take(real, key_words), grad_value = take(real, value_words), grad_query = take(real, key_strip);
  }
};

// T: of query, key and value; Grad: of the output's gradient; Out: of the results.
template <class E, class T, class Grad, class Out>
struct Backward {
  const T *query, *key, *value;
  const Grad* grad;
  const float *delta, *log_sum_exp;
  Out *grad_query, *grad_key, *grad_value;
  int64_t query_stride, key_stride, grad_stride, value_stride, row_stride, head_stride;  // the last two: of delta, lse
  int64_t groups, queries, keys;
  Ranges ranges;
  float scale;
  Packing<E> packing, values;  // of keys, of values

  int64_t offset(int64_t row) const { return row / groups * query_stride + row % groups * packing.dim; }
  int64_t grad_offset(int64_t row) const { return row / groups * grad_stride + row % groups * values.dim; }

  int64_t row_blocks() const { return (queries * groups + BLOCK - 1) / BLOCK; }

  void run() { run({0, row_blocks()}, grad_key, grad_value, key_stride, value_stride); }

  // What these blocks of rows give: their own gradients, and their part of those of all keys and values.
  template <class Part>
  void run(Range rows, Part* part_key, Part* part_value, int64_t part_key_stride, int64_t part_value_stride) {
    Range seen = hull(ranges, rows.first * BLOCK / groups, std::min(queries, (rows.last * BLOCK - 1) / groups + 1));
    BackwardWorkspace<E> work(packing, values, seen);
    int64_t count = seen.last - work.base;
    E::begin();
    pack_keys(work, seen);
    std::fill_n(work.grad_key, packing.words(count), 0.0f);
    std::fill_n(work.grad_value, values.words(count), 0.0f);
    for (int64_t first = rows.first; first < rows.last; first += STRIP)
      strip(work, first, std::min(rows.last, first + STRIP));
    E::end();
    write_rows(packing, work.grad_key, part_key, part_key_stride, work.base, seen.last);
    write_rows(values, work.grad_value, part_value, part_value_stride, work.base, seen.last);
  }

  void pack_keys(BackwardWorkspace<E>& work, Range seen) {
    for (int64_t j = work.base; j < seen.last; j += BLOCK) {
      int64_t at = packing.words(j - work.base);
      auto row_of = [&](const T* base, int64_t stride) {
        return [=](int i) { return j + i < seen.last ? base + (j + i) * stride : nullptr; };
      };
      packing.left(row_of(key, key_stride), work.key + at);
      packing.left_transposed(work.key + at, work.key_transposed + at);
      values.left(row_of(value, value_stride), work.value + values.words(j - work.base));
    }
  }

  // Pack the rows of a strip; delta and lse of rows past the end make their weights zero.
  void pack_strip(BackwardWorkspace<E>& work, int64_t first, int64_t last) {
    int64_t end = queries * groups;
    for (int64_t b = first; b < last; ++b) {
      int64_t row = b * BLOCK, at = packing.words((b - first) * BLOCK), value_at = values.words((b - first) * BLOCK);
      packing.left([&](int i) { return row + i < end ? query + offset(row + i) : nullptr; }, work.left);
      packing.right(work.left, work.query + at);
      packing.right_transposed(work.left, work.query_transposed + at);
      values.left([&](int i) { return row + i < end ? grad + grad_offset(row + i) : nullptr; }, work.left);
      values.right(work.left, work.grad + value_at);
      values.right_transposed(work.left, work.grad_transposed + value_at);
      work.seen[b - first] = BlockRanges(ranges, groups, row, std::min<int64_t>(BLOCK, end - row));
      for (int i = 0; i < BLOCK; ++i) {
        int64_t r = row + i, place = r / groups * row_stride + r % groups * head_stride;
        int64_t local = (b - first) * BLOCK + i;
        work.lse[local] = r < end ? log_sum_exp[place] * LOG2_E : 3.0e38f;
        work.delta[local] = r < end ? delta[place] : 0.0f;
      }
    }
  }

  void strip(BackwardWorkspace<E>& work, int64_t first, int64_t last) {
    pack_strip(work, first, last);
    std::fill_n(work.grad_query, packing.words((last - first) * BLOCK), 0.0f);
    int64_t end = queries * groups;
    Range seen = hull(ranges, first * BLOCK / groups, (std::min(end, last * BLOCK) - 1) / groups + 1);
    int64_t begin_block = seen.first / BLOCK, end_block = (seen.last + BLOCK - 1) / BLOCK;
    for (int64_t group = begin_block / KEY_GROUP * KEY_GROUP; group < end_block; group += KEY_GROUP) {
      int64_t group_end = std::min(end_block, group + KEY_GROUP);
      for (int64_t b = std::max(group, begin_block); b < group_end; ++b) {
        Range rows = rows_that_see(work, b, last - first);
        if (rows.first >= rows.last) continue;
        for (int64_t r = rows.first; r < rows.last; ++r) one_block(work, b, r, b - group);
        add_key_gradients(work, b, rows.first, rows.last);
      }
      add_query_gradients(work, group, group_end, last - first);
    }
    write_query_rows(work, first, last);
  }

  // The strip's blocks of rows, of `count`, from the first to the last that sees block b of keys.
  static Range rows_that_see(const BackwardWorkspace<E>& work, int64_t b, int64_t count) {
    Range rows{count, 0};
    for (int64_t r = 0; r < count; ++r) {
      const Range& any = work.seen[r].any;
      if (any.first < (b + 1) * BLOCK && any.last > b * BLOCK) rows = {std::min(rows.first, r), r + 1};
    }
    return rows;
  }

  void one_block(BackwardWorkspace<E>& work, int64_t b, int64_t local, int64_t in_group) {
    int64_t key = b * BLOCK - work.base, row = local * BLOCK;
    E::template multiply<2>(work.scores, BLOCK, false, work.key + packing.words(key), packing.depth, 1,
                            work.query_transposed + packing.words(row), packing.depth, 1, packing.depth);
    E::template multiply<2>(work.weight_grad, BLOCK, false, work.value + values.words(key), values.depth, 1,
                            work.grad_transposed + values.words(row), values.depth, 1, values.depth);
    const BlockRanges& seen = work.seen[local];
    bool masked = seen.hides(b * BLOCK);
    IntVec first[2], limit[2];
    Vec lse[2], delta[2];
    for (int n = 0; n < 2; ++n) {
      read(seen.first + 16 * n, first[n]);
      read(seen.limit + 16 * n, limit[n]);
      lse[n] = load(work.lse + row + 16 * n);
      delta[n] = load(work.delta + row + 16 * n);
    }
    const float factor = scale, factor_of_two = scale * LOG2_E;  // local, so that stores do not make them read again
    const float *scores = work.scores, *weight_grad = work.weight_grad;
    typename E::Word* weights = work.weights + row * BLOCK;
    typename E::Word* score_grad = work.score_grad + row * BLOCK;
    typename E::Word* group = work.score_grad_group + (local * KEY_GROUP + in_group) * BLOCK * BLOCK;
    for (int i = 0; i < BLOCK; i += 2) {
      Vec grads[2][2];
      for (int k = 0; k < 2; ++k) {
        Vec p[2];
        for (int n = 0; n < 2; ++n) {
          int at = (i + k) * BLOCK + 16 * n;
          p[n] = power_of_two(load(scores + at) * factor_of_two - lse[n]);
          if (masked) p[n] = choose(unseen(int32_t(b * BLOCK + i + k), first[n], limit[n]), Vec{}, p[n]);
          grads[k][n] = p[n] * (load(weight_grad + at) - delta[n]) * factor;
        }
        E::put_left(weights, i + k, p[0], p[1]);
        E::put_left(score_grad, i + k, grads[k][0], grads[k][1]);
      }
      E::put_right(group, i, grads[0][0], grads[0][1], grads[1][0], grads[1][1]);
    }
  }

  // dV and dK of one block of keys, summed over the strip's rows begin ... end - 1 (blocks).
  void add_key_gradients(BackwardWorkspace<E>& work, int64_t b, int64_t begin, int64_t end) {
    add_rows(values, work.grad_value, work.weights, work.grad, b * BLOCK - work.base, begin, end);
    add_rows(packing, work.grad_key, work.score_grad, work.query, b * BLOCK - work.base, begin, end);
  }

  static void add_rows(const Packing<E>& sizes, float* sums, const typename E::Word* factors,
                       const typename E::Word* rows, int64_t key, int64_t begin, int64_t end) {
    int64_t width = sizes.columns * 16, depth = (end - begin) * BLOCK / E::DEPTH;
    for (int64_t d = 0; d < width; d += BLOCK)
      E::template multiply<2>(sums + sizes.words(key) + d, width, true, factors + begin * BLOCK * BLOCK, 1, 2,
                              rows + sizes.words(begin * BLOCK) + d / 16 * E::TILE, 1, sizes.columns, depth);
  }

  void add_query_gradients(BackwardWorkspace<E>& work, int64_t group, int64_t group_end, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const Range& any = work.seen[r].any;
      int64_t begin = std::max(group, any.first / BLOCK), end = std::min(group_end, (any.last + BLOCK - 1) / BLOCK);
      if (begin >= end) continue;
      const typename E::Word* keys = work.key_transposed + packing.words(begin * BLOCK - work.base);
      const typename E::Word* grads = work.score_grad_group + (r * KEY_GROUP + begin - group) * BLOCK * BLOCK;
      for (int64_t d = 0; d < packing.columns * 16; d += BLOCK)
        E::template multiply<2>(work.grad_query + packing.words(r * BLOCK) + d * BLOCK, BLOCK, true,
                                keys + d / 16 * E::TILE, 1, packing.columns, grads, 1, 2,
                                (end - begin) * BLOCK / E::DEPTH);
    }
  }

  void write_query_rows(BackwardWorkspace<E>& work, int64_t first, int64_t last) {
    alignas(64) float tile[256];
    int64_t end = std::min(queries * groups, last * BLOCK);
    for (int64_t row = first * BLOCK; row < end; row += 16)
      for (int64_t d = 0; d < packing.dim; d += 16) {
        const float* from = work.grad_query + packing.words((row / BLOCK - first) * BLOCK) + d * BLOCK + row % BLOCK;
        transpose(from, BLOCK * sizeof(float), tile);
        for (int64_t i = row; i < std::min(end, row + 16); ++i)
          store(grad_query + offset(i) + d, load(tile + (i - row) * 16), packing.dim - d);
      }
  }

  template <class Part>
  void write_rows(const Packing<E>& sizes, const float* sums, Part* to, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t d = 0; d < sizes.dim; d += LANES) {
        bool seen = j >= begin && j < end;
        store(to + j * stride + d, seen ? load(sums + (j - begin) * sizes.columns * 16 + d) : Vec{}, sizes.dim - d);
      }
  }
};

}  // namespace liaoyuan

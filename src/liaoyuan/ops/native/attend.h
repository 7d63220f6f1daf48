// Attention forward (FlashAttention's blocked softmax: Dao et al. 2022, arXiv 2205.14135), whatever a query sees.
//
// Scores are computed transposed, [keys, rows], so that the softmax runs down columns without any sum across
// lanes. A row is one query of one head; the query heads that share a key head are rows of the same block. A row
// adds up its keys in blocks counted from the first key of its sequence, whatever is computed beside it, so that
// training, prefill in chunks and decode give the same bits. Keys that it does not see add zeros, which change none.
#pragma once
#include "ranges.h"

namespace liaoyuan {

template <class T, class Out>
struct Rows {  // queries first ... last - 1 of one sequence and one key head
  const T* query;
  Out* out;
  float* log_sum_exp;  // of this group's first head, or null
  const float* sinks;  // likewise
  int64_t query_stride, out_stride, log_sum_exp_stride, log_sum_exp_head_stride, groups, first, last;
  Ranges ranges;
  int64_t query_of(int64_t row) const { return row / groups; }
  const T* query_at(int64_t row, int64_t dim) const {
    return query + query_of(row) * query_stride + row % groups * dim;
  }
  Out* out_at(int64_t row, int64_t dim) const { return out + query_of(row) * out_stride + row % groups * dim; }
  float& log_sum_exp_at(int64_t row) const {
    return log_sum_exp[query_of(row) * log_sum_exp_stride + row % groups * log_sum_exp_head_stride];
  }
};

template <class E>
struct Workspace {
  Packing<E> keys, values;
  int64_t base;  // first packed key
  typename E::Word *key, *value, *weights, *query, *left;
  float *scores, *out;

  Workspace(const Packing<E>& keys, const Packing<E>& values, Range seen)
      : keys(keys), values(values), base(seen.first / BLOCK * BLOCK) {
    int64_t count = seen.last - base, block = keys.words(BLOCK), left_words = std::max(block, values.words(BLOCK));
    int64_t words = keys.words(count) + values.words(count) + KEY_CHUNK * BLOCK + block + left_words;
    key = static_cast<typename E::Word*>(scratch(0, size_t(words) * sizeof(*key)));
    value = key + keys.words(count);
    weights = value + values.words(count);
    query = weights + KEY_CHUNK * BLOCK;
    left = query + block;
    scores = static_cast<float*>(scratch(1, size_t(KEY_CHUNK * BLOCK + values.words(BLOCK)) * sizeof(float)));
    out = scores + KEY_CHUNK * BLOCK;
  }
  const typename E::Word* key_at(int64_t j) const { return key + keys.words(j - base); }
  const typename E::Word* value_at(int64_t j) const { return value + values.words(j - base); }
};

// One block of up to 16 * COLUMNS rows against all the keys that they see.
template <class E, int COLUMNS>
struct BlockSoftmax {
  Workspace<E>& work;
  const BlockRanges& seen;
  float scale;
  IntVec first[COLUMNS], limit[COLUMNS];
  Vec top[COLUMNS], sums[COLUMNS];

  BlockSoftmax(Workspace<E>& work, const BlockRanges& seen, float scale)
      : work(work), seen(seen), scale(scale * LOG2_E) {
    for (int n = 0; n < COLUMNS; ++n) {
      read(seen.first + 16 * n, first[n]);
      read(seen.limit + 16 * n, limit[n]);
      top[n] = splat(LOWEST), sums[n] = Vec{};
    }
  }

  void run() {
    int64_t chunk = seen.any.first / KEY_CHUNK * KEY_CHUNK;
    std::fill_n(work.out, seen.any.last ? 0 : work.values.words(BLOCK), 0.0f);
    for (bool add = false; chunk < seen.any.last; chunk += KEY_CHUNK, add = true) {
      Vec old[COLUMNS];
      for (int n = 0; n < COLUMNS; ++n) old[n] = top[n];
      int64_t begin = std::max(seen.any.first, chunk) / BLOCK * BLOCK;
      int64_t end = std::min(seen.any.last, chunk + KEY_CHUNK);
      for (int64_t key = begin; key < end; key += BLOCK) score(key, work.scores + (key - chunk) * BLOCK);
      if (add) rescale(old);
      int64_t count = (end - begin + BLOCK - 1) / BLOCK * BLOCK;
      weigh(work.scores + (begin - chunk) * BLOCK, count);
      for (int64_t d = 0; d < work.values.columns * 16; d += BLOCK)
        E::template multiply<COLUMNS>(work.out + d * BLOCK, BLOCK, add, work.value_at(begin) + d / 16 * E::TILE, 1,
                                      work.values.columns, work.weights, 1, 2, count / E::DEPTH);
    }
  }

  void score(int64_t key, float* scores) {
    int64_t depth = work.keys.depth;
    E::template multiply<COLUMNS>(scores, BLOCK, false, work.key_at(key), depth, 1, work.query, depth, 1, depth);
    const bool masked = seen.hides(key);
    const float factor = scale;
    Vec best[COLUMNS];  // local, so that it stays in registers
    for (int n = 0; n < COLUMNS; ++n) best[n] = top[n];
    for (int i = 0; i < BLOCK; ++i)
      for (int n = 0; n < COLUMNS; ++n) {
        Vec s = load(scores + i * BLOCK + 16 * n) * factor;
        if (masked) s = choose(unseen(int32_t(key + i), first[n], limit[n]), splat(HIDDEN), s);
        store(scores + i * BLOCK + 16 * n, s);
        best[n] = maximum(best[n], s);
      }
    for (int n = 0; n < COLUMNS; ++n) top[n] = best[n];
  }

  void rescale(const Vec* old) {
    Vec shrink[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) shrink[n] = power_of_two(old[n] - top[n]), sums[n] *= shrink[n];
    for (int64_t d = 0; d < work.values.columns * 16; ++d)
      for (int n = 0; n < COLUMNS; ++n) {
        float* cell = work.out + d * BLOCK + 16 * n;
        store(cell, load(cell) * shrink[n]);
      }
  }

  void weigh(const float* scores, int64_t count) {
    Vec total[COLUMNS], most[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) total[n] = sums[n], most[n] = top[n];
    typename E::Word* weights = work.weights;
    for (int64_t i = 0; i < count; i += 2) {
      Vec p[2][2] = {};
      for (int r = 0; r < 2; ++r)
        for (int n = 0; n < COLUMNS; ++n) {
          p[r][n] = power_of_two(load(scores + (i + r) * BLOCK + 16 * n) - most[n]);
          total[n] += p[r][n];
        }
      E::put_right(weights + i / BLOCK * BLOCK * BLOCK, int(i % BLOCK), p[0][0], p[0][1], p[1][0], p[1][1]);
    }
    for (int n = 0; n < COLUMNS; ++n) sums[n] = total[n];
  }

  template <class T, class Out>
  void write(const Rows<T, Out>& rows, int64_t row, int64_t count) {
    alignas(64) float sink[BLOCK], factor[BLOCK], total[BLOCK], highest[BLOCK], tile[256];
    for (int i = 0; i < BLOCK; ++i) sink[i] = rows.sinks ? rows.sinks[(row + i) % rows.groups] : HIDDEN;
    for (int n = 0; n < COLUMNS; ++n) {
      Vec sum, most;
      store(factor + 16 * n, finish(top[n], sums[n], load(sink + 16 * n), sum, most));
      store(total + 16 * n, sum);
      store(highest + 16 * n, most);
    }
    int64_t dim = work.values.dim;
    for (int64_t d = 0; d < dim; d += 16)
      for (int n = 0; n < COLUMNS; ++n) {
        transpose(work.out + d * BLOCK + 16 * n, BLOCK * sizeof(float), tile);
        for (int i = 16 * n; i < std::min<int64_t>(count, 16 * n + 16); ++i)
          store(rows.out_at(row + i, dim) + d, load(tile + i % 16 * 16) * factor[i], dim - d);
      }
    if (rows.log_sum_exp)
      for (int i = 0; i < count; ++i) rows.log_sum_exp_at(row + i) = highest[i] * LN_2 + std::log(total[i]);
  }
};

template <class E, class T, class Out, int COLUMNS>
void attend_block(const Rows<T, Out>& rows, int64_t row, int64_t count, Workspace<E>& work, float scale) {
  work.keys.left([&](int i) { return i < count ? rows.query_at(row + i, work.keys.dim) : nullptr; }, work.left);
  work.keys.right_transposed(work.left, work.query);
  BlockRanges seen(rows.ranges, rows.groups, row, count);
  BlockSoftmax<E, COLUMNS> softmax(work, seen, scale);
  softmax.run();
  softmax.write(rows, row, count);
}

// key(j), value(j): pointers to the rows of this sequence's tokens.
template <class E, class T, class Out, class Key, class Value>
void attend(const Rows<T, Out>& rows, const Key& key, const Value& value, int64_t dim, int64_t value_dim, float scale) {
  Range seen = hull(rows.ranges, rows.first, rows.last);
  Workspace<E> work{Packing<E>(dim), Packing<E>(value_dim), seen};
  E::begin();
  for (int64_t j = work.base; j < seen.last; j += BLOCK) {
    auto inside = [&](int i) { return j + i >= seen.first && j + i < seen.last; };
    work.keys.left([&](int i) { return inside(i) ? key(j + i) : nullptr; }, work.key + work.keys.words(j - work.base));
    work.values.left([&](int i) { return inside(i) ? value(j + i) : nullptr; }, work.left);
    work.values.left_transposed(work.left, work.value + work.values.words(j - work.base));
  }
  for (int64_t row = rows.first * rows.groups; row < rows.last * rows.groups; row += BLOCK) {
    int64_t count = std::min<int64_t>(BLOCK, rows.last * rows.groups - row);
    if (count > 16)
      attend_block<E, T, Out, 2>(rows, row, count, work, scale);
    else
      attend_block<E, T, Out, 1>(rows, row, count, work, scale);
  }
  E::end();
}

// Rows of a task: many, as each task packs all keys that it sees, but so that every thread finds some tasks. `heads`:
// how many sequences' key heads there are, each of up to so many queries.
inline int64_t rows_per_task(int64_t heads, int64_t queries, int64_t groups) {
  int64_t fair = heads * queries * groups / (8 * threads());
  return std::clamp<int64_t>(fair / 512 * 512, 512, 2048);
}

}  // namespace liaoyuan

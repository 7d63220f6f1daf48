// Decode: one query per sequence, its few heads against all cached keys. The blocked kernel would fill a sixteenth of
// its tiles. Here lanes are keys for the scores and dimensions for the output. Some key heads go through the cache
// together, so that a page is read once, as a whole.
//
// Every sum runs in the order of the blocked kernel (Dot: with its instruction; Amx: even and odd places apart within
// 32, as the tile instruction does, as products of two bf16 are exact in fp32), so that both give the same bits.
#pragma once
#include <type_traits>

#include "ranges.h"

namespace liaoyuan {

template <class E>
constexpr bool IN_PAIRS = E::DEPTH == 32;
template <class E>
constexpr bool BY_DOT = requires { E::spread(nullptr); };

template <class T>
struct Cached {  // one sequence's keys and values, of the first of some key heads that lie side by side
  const T *keys, *values;
  const int32_t* table;
  int64_t block_size, key_stride, value_stride, dim, value_dim;
  int64_t slot(int64_t j) const { return table[j / block_size] * block_size + j % block_size; }
  const T* key(int64_t j) const { return keys + slot(j) * key_stride; }
  const T* value(int64_t j) const { return values + slot(j) * value_stride; }
};

template <class E>
bool can_decode(int64_t dim, int64_t value_dim, int64_t block_size) {
  return block_size % 16 == 0 && dim % (IN_PAIRS<E> ? 32 : 16) == 0 && value_dim % 16 == 0;
}

constexpr int KEYS = 64;  // that go through all heads, before the next ones do

// How many times 16 keys R rows score at once: a product waits for the one before it, so that several sums take turns.
template <int R>
constexpr int AT_ONCE = sizeof(Vec) > sizeof(Register) ? 1 : R >= 3 ? 2 : 4;

// scores [R][KEY_CHUNK], of which 16 * N, from as many keys with lanes for keys (`columns`, 16 keys after the others);
// query [R][dim], also in fp32.
template <class E, int N, class T, int R>
void score(const float* columns, const T* query, const float* wide_query, int64_t dim, float scale, float* scores) {
  Vec sums[R][N] = {};
  if constexpr (BY_DOT<E>) {
    for (int64_t d = 0; d < dim; d += 2) {
      WordVec words[N];
      for (int n = 0; n < N; ++n) read(columns + n * 16 * dim + d / 2 * 16, words[n]);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = E::dot(sums[r][n], E::spread(query + r * dim + d), words[n]);
    }
  } else if constexpr (IN_PAIRS<E>) {
    for (int64_t tile = 0; tile < dim; tile += 32) {
      Vec even[R][N] = {}, odd[R][N] = {};
      for (int64_t d = tile; d < tile + 32; d += 2)
        for (int n = 0; n < N; ++n) {
          WordVec words;
          read(columns + n * 16 * dim + d / 2 * 16, words);
          Vec first = (Vec)(words << 16), second = (Vec)(words & 0xffff0000u);
          for (int r = 0; r < R; ++r) {
            even[r][n] += first * wide_query[r * dim + d];
            odd[r][n] += second * wide_query[r * dim + d + 1];
          }
        }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] += even[r][n] + odd[r][n];
    }
  } else {
    for (int64_t d = 0; d < dim; ++d)
      for (int n = 0; n < N; ++n) {
        Vec column = load(columns + n * 16 * dim + d * 16);
        for (int r = 0; r < R; ++r) sums[r][n] += column * wide_query[r * dim + d];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(scores + r * KEY_CHUNK + 16 * n, sums[r][n] * scale);
}

template <class T>
const T* pair_at(const float* weights, int64_t key) {
  return reinterpret_cast<const T*>(weights + key / 32 * 32) + key % 32;
}

// out [R][dim] += weights [R][keys] times the values from element d on, `dim` their width, two vectors of dimensions
// at a time. Dot: weights are pairs of bf16, those of 32 keys in the first half of their 32 places.
template <class E, class T, int R, int WIDE>
void gather_values(const T* const* value, int64_t d, int64_t keys, const float* weights, float* out, int64_t dim) {
  Vec sums[R][WIDE];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) sums[r][n] = load(out + r * dim + 16 * n);
  if constexpr (BY_DOT<E>) {
    for (int64_t j = 0; j < keys; j += 2)
      for (int n = 0; n < WIDE; ++n) {
        WordVec pair = words_of(reinterpret_cast<const uint16_t*>(value[j] + d + 16 * n));
        pair = pair | (WordVec)load(value[j + 1] + d + 16 * n);  // zeros after the last
        for (int r = 0; r < R; ++r)
          sums[r][n] = E::dot(sums[r][n], E::spread(pair_at<T>(weights + r * KEY_CHUNK, j)), pair);
      }
  } else if constexpr (IN_PAIRS<E>) {
    for (int64_t block = 0; block < keys; block += 32) {
      Vec halves[2][R][WIDE] = {};
      int64_t end = block + 32 < keys ? block + 32 : keys;
      for (int64_t j = block; j < end; j += 2)
        for (int odd = 0; odd < 2 && j + odd < end; ++odd)
          for (int n = 0; n < WIDE; ++n) {
            Vec v = load(value[j + odd] + d + 16 * n);
            for (int r = 0; r < R; ++r) halves[odd][r][n] += v * weights[r * KEY_CHUNK + j + odd];
          }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < WIDE; ++n) sums[r][n] += halves[0][r][n] + halves[1][r][n];
    }
  } else {
    for (int64_t j = 0; j < keys; ++j)
      for (int n = 0; n < WIDE; ++n) {
        Vec v = load(value[j] + d + 16 * n);
        for (int r = 0; r < R; ++r) sums[r][n] += v * weights[r * KEY_CHUNK + j];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) store(out + r * dim + 16 * n, sums[r][n]);
}

// The same for Dot, 32 * WIDE dimensions at a time: words of two keys part into pairs of the even and of the odd
// dimensions, and so apart they stay in `out` until the end.
template <class E, class T, int R, int WIDE>
void gather_pairs(const T* const* value, int64_t d, int64_t keys, const float* weights, float* out, int64_t dim) {
  Vec even[R][WIDE], odd[R][WIDE];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) {
      even[r][n] = load(out + r * dim + 32 * n);
      odd[r][n] = load(out + r * dim + 32 * n + 16);
    }
  for (int64_t j = 0; j < keys; j += 2)
    for (int n = 0; n < WIDE; ++n) {
      WordVec first, second;
      read(value[j] + d + 32 * n, first);
      read(value[j + 1] + d + 32 * n, second);  // zeros after the last
      __builtin_prefetch(value[j + KEYS] + d + 32 * n);
      __builtin_prefetch(value[j + KEYS + 1] + d + 32 * n);
      WordVec low = (first & 0xffffu) | (second << 16), high = (first >> 16) | (second & 0xffff0000u);
      for (int r = 0; r < R; ++r) {
        WordVec own = E::spread(pair_at<T>(weights + r * KEY_CHUNK, j));
        even[r][n] = E::dot(even[r][n], own, low);
        odd[r][n] = E::dot(odd[r][n], own, high);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) {
      store(out + r * dim + 32 * n, even[r][n]);
      store(out + r * dim + 32 * n + 16, odd[r][n]);
    }
}

// columns: 16 rows of keys, transposed.
template <class E, class T, class Meanwhile>
void transpose_keys(const T* keys, int64_t stride, int64_t dim, float* columns, const Meanwhile& meanwhile) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
    meanwhile(d);
    if constexpr (IN_PAIRS<E> || sizeof(T) == 4) {
      transpose(keys + d, stride * sizeof(T), columns + d * sizeof(T) * 4);
    } else {  // bf16 without products of pairs: as fp32
      float square[256];
      for (int64_t part = 0; part < 32 && d + part < dim; part += 16) {
        for (int i = 0; i < 16; ++i) store(square + 16 * i, load(keys + i * stride + d + part));
        transpose(square, 64, columns + (d + part) * 16);
      }
    }
  }
}

// Call body(R, row) for `rows` rows, four of them at a time, and then the rest.
template <class Body>
void over_few_rows(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(std::integral_constant<int, 4>{}, row);
  if (row + 3 == rows) return body(std::integral_constant<int, 3>{}, row);
  if (row + 2 == rows) return body(std::integral_constant<int, 2>{}, row);
  if (row + 1 == rows) return body(std::integral_constant<int, 1>{}, row);
}

// The query's heads, in rows: `groups` for each of `heads` key heads.
template <class E, class T>
struct Decode {
  const Cached<T>& cached;
  const Range seen;
  const float scale;
  const T* query;
  const int64_t heads, groups, rows, dim, value_dim;
  const bool read_first;
  float *wide_query, *out, *scores, *columns, *zeros, *top, *sums;
  Vec* best;
  const T* value[KEY_CHUNK + KEYS] = {};

  struct Rows {  // sixteen
    const T* first;
    int64_t stride;
    [[gnu::always_inline]] void ask(int64_t d) const {  // a function that only asks would be optimised away
      for (int i = 0; i < 16; ++i) __builtin_prefetch(first + i * stride + d);
    }
  };

  Decode(const Cached<T>& cached, Range seen, float scale, const T* query, int64_t heads, int64_t groups,
         bool read_first)
      : cached(cached), seen(seen), scale(scale * LOG2_E), query(query), heads(heads), groups(groups),
        rows(heads * groups), dim(cached.dim), value_dim(cached.value_dim), read_first(read_first) {
    int64_t size = rows * (16 + dim + value_dim + KEY_CHUNK + 2) + KEYS * dim + heads * value_dim;
    best = static_cast<Vec*>(scratch(0, size_t(size) * sizeof(float)));
    wide_query = reinterpret_cast<float*>(best + rows), out = wide_query + rows * dim, scores = out + rows * value_dim;
    columns = scores + rows * KEY_CHUNK, zeros = columns + KEYS * dim, top = zeros + heads * value_dim;
    sums = top + rows;
    for (int64_t i = 0; i < rows * dim; ++i) wide_query[i] = widen(query[i]);
    std::fill_n(out, rows * value_dim, 0.0f);
    std::fill_n(zeros, heads * value_dim, 0.0f);
    std::fill_n(top, rows, LOWEST);
    std::fill_n(sums, rows, 0.0f);
  }

  void run() {
    for (int64_t chunk = seen.first / KEY_CHUNK * KEY_CHUNK; chunk < seen.last; chunk += KEY_CHUNK) {
      int64_t begin = std::max(seen.first, chunk) / BLOCK * BLOCK - chunk;
      int64_t count = std::min(seen.last - chunk, KEY_CHUNK);
      for (int64_t row = 0; row < rows; ++row) best[row] = splat(top[row]);
      if (read_first) {
        bring(chunk + begin, chunk + count, heads * dim, cached.key_stride, [&](int64_t j) { return cached.key(j); });
        bring(chunk + begin, chunk + count, heads * value_dim, cached.value_stride,
              [&](int64_t j) { return cached.value(j); });
      }
      for (int64_t j = begin; j < count; j += KEYS) score_keys(chunk, j, std::min<int64_t>(count - j, KEYS), count);
      over_few_rows(rows, [&](auto few, int64_t row) { weigh<few>(row, begin, count); });
      for (int64_t j = begin; j < count; j += KEYS) add_values(j, std::min<int64_t>(count - j, KEYS));
    }
  }

  // Bring keys or values (`at` gives one's place) near by reading them, if not too many for a thread's own cache.
  template <class At>
  void bring(int64_t begin, int64_t end, int64_t width, int64_t stride, const At& at) const {
    constexpr int64_t LINE = 64 / sizeof(T), OWN_CACHE = 1 << 18;
    if ((end - begin) * width * int64_t(sizeof(T)) > OWN_CACHE) return;
    constexpr int64_t ROWS = 8;
    const T* next = at(begin);
    for (int64_t j = begin; j < end; j += ROWS) {
      const T* rows = next;
      next = at(std::min(j + ROWS, end - 1) / ROWS * ROWS);
      for (int64_t i = 0; i < ROWS * stride; i += stride)
        for (int64_t d = i; d < i + width; d += LINE) {
          __builtin_prefetch(next + d, 0, 2);
          static_cast<void>(*reinterpret_cast<const volatile char*>(rows + d));
        }
    }
  }

  // Scores of `count` keys from `first` of the chunk on, which has `all`.
  void score_keys(int64_t chunk, int64_t first, int64_t count, int64_t all) {
    int64_t blocks = (count + 15) / 16;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t n = 0; n < blocks; ++n) {
        int64_t j = first + 16 * n, next = j + KEYS;
        Rows ahead = next < all ? Rows{cached.key(chunk + next), cached.key_stride}
                                : Rows{cached.value(chunk + 16 * n), cached.value_stride};
        transpose_keys<E>(cached.key(chunk + j) + head * dim, cached.key_stride, dim, columns + n * 16 * dim,
                          [&](int64_t d) { ahead.ask(head * dim + d); });
      }
      over_few_rows(groups, [&](auto few, int64_t row) {
        constexpr int N = AT_ONCE<few>;
        row += head * groups;
        int64_t n = 0;
        for (; n + N <= blocks; n += N) score_rows<few, N>(row, n, first);
        for (; n < blocks; ++n) score_rows<few, 1>(row, n, first);
      });
    }
    for (int64_t j = first; j < first + count; j += 16) {
      const T* values = cached.value(chunk + j);
      for (int i = 0; i < 16; ++i) value[j + i] = values + i * cached.value_stride;
      if (chunk + j < seen.first || chunk + j + 16 > seen.last) hide(chunk + j, scores + j, value + j);
      for (int64_t row = 0; row < rows; ++row) best[row] = maximum(best[row], load(scores + row * KEY_CHUNK + j));
    }
  }

  template <int R, int N>
  void score_rows(int64_t row, int64_t n, int64_t first) {
    score<E, N, T, R>(columns + n * 16 * dim, query + row * dim, wide_query + row * dim, dim, scale,
                      scores + row * KEY_CHUNK + first + 16 * n);
  }

  // The pages before a window may be others' by now, and the last one's end was never written.
  void hide(int64_t key, float* cells, const T** values) {
    IntVec first = int32_t(seen.first - key) - lane_numbers(), limit = int32_t(seen.last - 1 - key) - lane_numbers();
    IntVec hidden = unseen(0, first, limit);
    for (int64_t row = 0; row < rows; ++row) {
      float* cell = cells + row * KEY_CHUNK;
      store(cell, choose(hidden, splat(HIDDEN), load(cell)));
    }
    for (int64_t i = 0; i < 16; ++i)
      if (key + i < seen.first || key + i >= seen.last) values[i] = reinterpret_cast<const T*>(zeros);
  }

  // Scores become weights, and what was summed before is brought to the new maximum.
  template <int R>
  void weigh(int64_t from, int64_t begin, int64_t count) {
    float total[R];  // local, so that it stays in registers
    float* weights = scores + from * KEY_CHUNK;
    for (int r = 0; r < R; ++r) {
      float *row = weights + r * KEY_CHUNK, old = top[from + r], most = highest(best[from + r]);
      float shrink = power_of_two(splat(old - most))[0];
      top[from + r] = most;
      total[r] = sums[from + r] * shrink;
      for (int64_t d = 0; d < value_dim; d += 16) {
        float* cell = out + (from + r) * value_dim + d;
        store(cell, load(cell) * shrink);
      }
      for (int64_t j = begin; j < count; j += 16) store(row + j, power_of_two(load(row + j) - most));
    }
    for (int64_t j = begin; j < count; ++j)
      for (int r = 0; r < R; ++r) total[r] += weights[r * KEY_CHUNK + j];
    std::copy_n(total, R, sums + from);
    for (int r = 0; r < R; ++r) narrow(weights + r * KEY_CHUNK + begin, count - begin);
  }

  // Weights as the products take them.
  static void narrow(float* weights, int64_t count) {
    if constexpr (BY_DOT<E>)
      for (int64_t j = 0; j < count; j += 32)
        liaoyuan::write(weights + j, E::narrow(load(weights + j), j + 16 < count ? load(weights + j + 16) : Vec{}));
    else if constexpr (IN_PAIRS<E>)
      for (int64_t j = 0; j < count; j += 16) store(weights + j, rounded<BFloat16>(load(weights + j)));
  }

  // Of `keys` from `first` of the chunk on.
  void add_values(int64_t first, int64_t keys) {
    for (int64_t head = 0; head < heads; ++head)
      over_few_rows(groups, [&](auto few, int64_t row) {
        row += head * groups;
        add_values_of<few>(value + first, head * value_dim, keys, scores + row * KEY_CHUNK + first,
                           out + row * value_dim);
      });
  }

  template <int R>
  void add_values_of(const T* const* from, int64_t offset, int64_t keys, const float* weights, float* to) {
    constexpr int WIDE = 4 / R;  // times 32 dimensions: eight sums take turns
    int64_t d = 0;
    if constexpr (BY_DOT<E>) {
      for (; d + 32 * WIDE <= value_dim; d += 32 * WIDE)
        gather_pairs<E, T, R, WIDE>(from, offset + d, keys, weights, to + d, value_dim);
      for (; d + 32 <= value_dim; d += 32)
        gather_pairs<E, T, R, 1>(from, offset + d, keys, weights, to + d, value_dim);
    }
    for (; d + 32 <= value_dim; d += 32)
      gather_values<E, T, R, 2>(from, offset + d, keys, weights, to + d, value_dim);
    if (d < value_dim) gather_values<E, T, R, 1>(from, offset + d, keys, weights, to + d, value_dim);
  }

  void write(const float* sinks, T* to) {
    for (int64_t row = 0; row < rows; ++row) {
      Vec total, most, sink = splat(sinks ? sinks[row] : HIDDEN);
      Vec factor = finish(splat(top[row]), splat(sums[row]), sink, total, most);
      const float* from = out + row * value_dim;
      T* own = to + row * value_dim;
      int64_t d = 0;
      for (; BY_DOT<E> && d + 32 <= value_dim; d += 32) {
        Vec low, high;
        zip(load(from + d) * factor, load(from + d + 16) * factor, low, high);
        store(own + d, low);
        store(own + d + 16, high);
      }
      for (; d < value_dim; d += 16) store(own + d, load(from + d) * factor);
    }
  }
};

// query [heads * groups, dim], out [heads * groups, value_dim], sinks [heads * groups] or null. read_first: keys and
// values are brought near before they are used.
template <class E, class T>
void decode(const T* query, T* out, const float* sinks, int64_t heads, int64_t groups, const Cached<T>& cached,
            Range seen, float scale, bool read_first) {
  Decode<E, T> rows(cached, seen, scale, query, heads, groups, read_first);
  rows.run();
  rows.write(sinks, out);
}

}  // namespace liaoyuan

// Decode: one query per sequence, its few heads against all cached keys of one key head. The blocked kernel would
// fill a sixteenth of its tiles. Here lanes are keys for the scores and dimensions for the output.
//
// Every sum runs in the order of the blocked kernel (Dot: with its instruction; Amx: even and odd places apart within
// 32, as the tile instruction does, as products of two bf16 are exact in fp32), so that both give the same bits.
#pragma once
#include "ranges.h"

namespace liaoyuan {

template <class E>
constexpr bool IN_PAIRS = E::DEPTH == 32;
template <class E>
constexpr bool BY_DOT = requires { E::spread(nullptr); };

template <class T>
struct Cached {  // one sequence's keys and values of one key head
  const T *keys, *values;
  const int32_t* table;
  int64_t block_size, key_stride, value_stride, dim, value_dim;
  int64_t slot(int64_t j) const { return table[j / block_size] * block_size + j % block_size; }
  const T* key(int64_t j) const { return keys + slot(j) * key_stride; }
  const T* value(int64_t j) const { return values + slot(j) * value_stride; }
};

// Ask for 16 rows before they are used: a row is one or two cache lines, too short for the machine to guess the next.
template <class T>
void prefetch(const T* from, int64_t row_stride, int64_t dim) {
  for (int i = 0; i < 16; ++i) prefetch(from + i * row_stride, dim);
}

template <class E>
bool can_decode(int64_t dim, int64_t value_dim, int64_t block_size) {
  return block_size % 16 == 0 && dim % (IN_PAIRS<E> ? 32 : 16) == 0 && value_dim % 16 == 0;
}

// scores [R][KEY_CHUNK], of which 16, from 16 keys with lanes for keys (`columns`); query [R][dim], also in fp32.
template <class E, class T, int R>
void score(const float* columns, const T* query, const float* wide_query, int64_t dim, float scale, float* scores) {
  Vec sums[R] = {};
  if constexpr (BY_DOT<E>) {
    for (int64_t d = 0; d < dim; d += 2) {
      WordVec words;
      read(columns + d / 2 * 16, words);
      for (int r = 0; r < R; ++r) sums[r] = E::dot(sums[r], E::spread(query + r * dim + d), words);
    }
  } else if constexpr (IN_PAIRS<E>) {
    for (int64_t tile = 0; tile < dim; tile += 32) {
      Vec even[R] = {}, odd[R] = {};
      for (int64_t d = tile; d < tile + 32; d += 2) {
        WordVec words;
        read(columns + d / 2 * 16, words);
        Vec first = (Vec)(words << 16), second = (Vec)(words & 0xffff0000u);
        for (int r = 0; r < R; ++r) {
          even[r] += first * wide_query[r * dim + d];
          odd[r] += second * wide_query[r * dim + d + 1];
        }
      }
      for (int r = 0; r < R; ++r) sums[r] += even[r] + odd[r];
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) {
      Vec column = load(columns + d * 16);
      for (int r = 0; r < R; ++r) sums[r] += column * wide_query[r * dim + d];
    }
  }
  for (int r = 0; r < R; ++r) store(scores + r * KEY_CHUNK, sums[r] * scale);
}

// out [R][dim] += weights [R][keys] times the values, `dim` their width, two vectors of dimensions at a time.
// Dot: weights are pairs of bf16, still KEY_CHUNK words apart.
template <class E, class T, int R, int WIDE>
void gather_values(const T* const* value, int64_t keys, const float* weights, float* out, int64_t dim) {
  Vec sums[R][WIDE];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) sums[r][n] = load(out + r * dim + 16 * n);
  if constexpr (BY_DOT<E>) {
    const T* weight = reinterpret_cast<const T*>(weights);
    for (int64_t j = 0; j < keys; j += 2)
      for (int n = 0; n < WIDE; ++n) {
        WordVec pair = words_of(reinterpret_cast<const uint16_t*>(value[j] + 16 * n));
        pair = pair | (WordVec)load(value[j + 1] + 16 * n);  // zeros after the last
        for (int r = 0; r < R; ++r) sums[r][n] = E::dot(sums[r][n], E::spread(weight + r * 2 * KEY_CHUNK + j), pair);
      }
  } else if constexpr (IN_PAIRS<E>) {
    for (int64_t block = 0; block < keys; block += 32) {
      Vec halves[2][R][WIDE] = {};
      int64_t end = block + 32 < keys ? block + 32 : keys;
      for (int64_t j = block; j < end; j += 2)
        for (int odd = 0; odd < 2 && j + odd < end; ++odd)
          for (int n = 0; n < WIDE; ++n) {
            Vec v = load(value[j + odd] + 16 * n);
            for (int r = 0; r < R; ++r) halves[odd][r][n] += v * weights[r * KEY_CHUNK + j + odd];
          }
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < WIDE; ++n) sums[r][n] += halves[0][r][n] + halves[1][r][n];
    }
  } else {
    for (int64_t j = 0; j < keys; ++j)
      for (int n = 0; n < WIDE; ++n) {
        Vec v = load(value[j] + 16 * n);
        for (int r = 0; r < R; ++r) sums[r][n] += v * weights[r * KEY_CHUNK + j];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) store(out + r * dim + 16 * n, sums[r][n]);
}

// columns: 16 rows of keys, transposed.
template <class E, class T>
void transpose_keys(const T* keys, int64_t stride, int64_t dim, float* columns) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
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

// R heads of one query.
template <class E, class T, int R>
struct Decode {
  const Cached<T>& cached;
  Range seen;
  float scale;
  const T* query;
  float *wide_query, *out, *scores, *columns, *zeros;
  const T* value[KEY_CHUNK];
  float top[R], sums[R] = {};

  Decode(const Cached<T>& cached, Range seen, float scale, const T* query)
      : cached(cached), seen(seen), scale(scale * LOG2_E), query(query) {
    int64_t dim = cached.dim, value_dim = cached.value_dim;
    int64_t size = R * (dim + value_dim + KEY_CHUNK) + 16 * dim + value_dim;
    wide_query = static_cast<float*>(scratch(0, size_t(size) * sizeof(float)));
    out = wide_query + R * dim, scores = out + R * value_dim, columns = scores + R * KEY_CHUNK;
    zeros = columns + 16 * dim;
    for (int64_t i = 0; i < R * dim; ++i) wide_query[i] = widen(query[i]);
    std::fill_n(out, R * value_dim, 0.0f);
    std::fill_n(zeros, value_dim, 0.0f);
    std::fill_n(top, R, LOWEST);
  }

  void run() {
    for (int64_t chunk = seen.first / KEY_CHUNK * KEY_CHUNK; chunk < seen.last; chunk += KEY_CHUNK) {
      int64_t begin = std::max(seen.first, chunk) / BLOCK * BLOCK - chunk;
      int64_t count = std::min(seen.last - chunk, KEY_CHUNK);
      float old[R];
      std::copy_n(top, R, old);
      score_chunk(chunk, begin, count);
      weigh(old, begin, count);
      add_values(begin, count);
    }
  }

  void score_chunk(int64_t chunk, int64_t begin, int64_t count) {
    Vec best[R];
    for (int r = 0; r < R; ++r) best[r] = splat(top[r]);
    for (int64_t j = begin; j < count; j += 16) {
      const T *keys = cached.key(chunk + j), *values = cached.value(chunk + j);
      prefetch(values, cached.value_stride, cached.value_dim);
      if (chunk + j + 16 < seen.last) prefetch(cached.key(chunk + j + 16), cached.key_stride, cached.dim);
      for (int i = 0; i < 16; ++i) value[j + i] = values + i * cached.value_stride;
      transpose_keys<E>(keys, cached.key_stride, cached.dim, columns);
      score<E, T, R>(columns, query, wide_query, cached.dim, scale, scores + j);
      if (chunk + j < seen.first || chunk + j + 16 > seen.last) hide(chunk + j, scores + j, value + j);
      for (int r = 0; r < R; ++r) best[r] = maximum(best[r], load(scores + r * KEY_CHUNK + j));
    }
    for (int r = 0; r < R; ++r) top[r] = highest(best[r]);
  }

  // The pages before a window may be others' by now, and the last one's end was never written.
  void hide(int64_t key, float* cells, const T** values) {
    IntVec first = int32_t(seen.first - key) - lane_numbers(), limit = int32_t(seen.last - 1 - key) - lane_numbers();
    IntVec hidden = unseen(0, first, limit);
    for (int r = 0; r < R; ++r) {
      float* cell = cells + r * KEY_CHUNK;
      store(cell, choose(hidden, splat(HIDDEN), load(cell)));
    }
    for (int64_t i = 0; i < 16; ++i)
      if (key + i < seen.first || key + i >= seen.last) values[i] = reinterpret_cast<const T*>(zeros);
  }

  // Scores become weights, and what was summed before is brought to the new maximum.
  void weigh(const float* old, int64_t begin, int64_t count) {
    for (int r = 0; r < R; ++r) {
      float* row = scores + r * KEY_CHUNK;
      float shrink = power_of_two(splat(old[r] - top[r]))[0];
      sums[r] *= shrink;
      for (int64_t d = 0; d < cached.value_dim; d += 16) {
        float* cell = out + r * cached.value_dim + d;
        store(cell, load(cell) * shrink);
      }
      for (int64_t j = begin; j < count; j += 16) store(row + j, power_of_two(load(row + j) - top[r]));
    }
    float total[R];  // local, so that it stays in registers
    std::copy_n(sums, R, total);
    const float* weights = scores;
    for (int64_t j = begin; j < count; ++j)
      for (int r = 0; r < R; ++r) total[r] += weights[r * KEY_CHUNK + j];
    std::copy_n(total, R, sums);
    for (int r = 0; r < R; ++r) narrow(scores + r * KEY_CHUNK + begin, count - begin);
  }

  // Weights as the products take them; for Dot the pairs lie together at the beginning.
  static void narrow(float* weights, int64_t count) {
    if constexpr (BY_DOT<E>)
      for (int64_t j = 0; j < count; j += 32)
        liaoyuan::write(weights + j / 2, E::narrow(load(weights + j), j + 16 < count ? load(weights + j + 16) : Vec{}));
    else if constexpr (IN_PAIRS<E>)
      for (int64_t j = 0; j < count; j += 16) store(weights + j, rounded<BFloat16>(load(weights + j)));
  }

  void add_values(int64_t begin, int64_t count) {
    int64_t dim = cached.value_dim, d = 0;
    const T** rows = value + begin;
    for (; d + 32 <= dim; d += 32) {
      gather_values<E, T, R, 2>(rows, count - begin, scores + begin, out + d, dim);
      for (int64_t j = 0; j < count - begin; ++j) rows[j] += 32;
    }
    if (d < dim) gather_values<E, T, R, 1>(rows, count - begin, scores + begin, out + d, dim);
  }

  void write(const float* sinks, T* to) {
    for (int r = 0; r < R; ++r) {
      Vec total, most, sink = splat(sinks ? sinks[r] : HIDDEN);
      Vec factor = finish(splat(top[r]), splat(sums[r]), sink, total, most);
      for (int64_t d = 0; d < cached.value_dim; d += 16)
        store(to + r * cached.value_dim + d, load(out + r * cached.value_dim + d) * factor);
    }
  }
};

template <class E, class T, int R>
void decode_rows(const T* query, T* out, const float* sinks, const Cached<T>& cached, Range seen, float scale) {
  Decode<E, T, R> rows(cached, seen, scale, query);
  rows.run();
  rows.write(sinks, out);
}

// query [groups, dim], out [groups, value_dim], sinks [groups] or null.
template <class E, class T>
void decode(const T* query, T* out, const float* sinks, int64_t groups, const Cached<T>& cached, Range seen,
            float scale) {
  for (int64_t row = 0; row < groups;) {
    const T* q = query + row * cached.dim;
    T* o = out + row * cached.value_dim;
    const float* s = sinks ? sinks + row : nullptr;
    if (groups - row >= 4)
      decode_rows<E, T, 4>(q, o, s, cached, seen, scale), row += 4;
    else if (groups - row >= 2)
      decode_rows<E, T, 2>(q, o, s, cached, seen, scale), row += 2;
    else
      decode_rows<E, T, 1>(q, o, s, cached, seen, scale), row += 1;
  }
}

}  // namespace liaoyuan

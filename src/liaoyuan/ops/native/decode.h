// Decode: one query per sequence, its few heads against all cached keys of one key head. The blocked kernel would
// fill a sixteenth of its tiles. Here lanes are keys for the scores and dimensions for the output.
//
// Every sum runs in the order of the blocked kernel (Amx: even and odd places apart within 32, as the tile
// instruction does; products of two bf16 are exact in fp32), so that both give the same bits.
#pragma once
#include "tiles.h"

namespace liaoyuan {

constexpr int64_t KEY_CHUNK = 512;  // keys between two rescalings of the output
constexpr float LOWEST = -3.0e38f;

template <class E>
constexpr bool IN_PAIRS = E::DEPTH == 32;

struct Pages {  // where one sequence's rows of one key head are
  const int32_t* table;
  int64_t block_size, block_stride, row_stride;  // strides in elements
  int64_t offset(int64_t j) const { return table[j / block_size] * block_stride + j % block_size * row_stride; }
};

// Ask for 16 rows before they are used: a row is one or two cache lines, too short for the machine to guess the next.
template <class T>
void prefetch(const T* from, int64_t row_stride, int64_t dim) {
  for (int i = 0; i < 16; ++i)
    for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(from + i * row_stride + d);
}

template <class E>
bool can_decode(int64_t dim, int64_t block_size) {
  return block_size % 16 == 0 && dim % (IN_PAIRS<E> ? 32 : 16) == 0;
}

// scores [R][KEY_CHUNK], of which 16, from 16 keys with lanes for keys (`columns`); query [R][dim] fp32.
template <class E, class T, int R>
void score(const float* columns, const float* query, int64_t dim, float scale, float* scores) {
  Vec sums[R] = {};
  if constexpr (IN_PAIRS<E>) {
    for (int64_t tile = 0; tile < dim; tile += 32) {
      Vec even[R] = {}, odd[R] = {};
      for (int64_t d = tile; d < tile + 32; d += 2) {
        WordVec words;
        read(columns + d / 2 * 16, words);
        Vec first = (Vec)(words << 16), second = (Vec)(words & 0xffff0000u);
        for (int r = 0; r < R; ++r) {
          even[r] += first * query[r * dim + d];
          odd[r] += second * query[r * dim + d + 1];
        }
      }
      for (int r = 0; r < R; ++r) sums[r] += even[r] + odd[r];
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) {
      Vec column = load(columns + d * 16);
      for (int r = 0; r < R; ++r) sums[r] += column * query[r * dim + d];
    }
  }
  for (int r = 0; r < R; ++r) store(scores + r * KEY_CHUNK, sums[r] * scale);
}

// out [R][dim] += weights [R][keys] times the values, two vectors of dimensions at a time.
template <class E, class T, int R, int WIDE>
void gather_values(const T* const* value, int64_t keys, const float* weights, float* out, int64_t dim) {
  Vec sums[R][WIDE];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < WIDE; ++n) sums[r][n] = load(out + r * dim + 16 * n);
  if constexpr (IN_PAIRS<E>) {
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

template <class E, class T, int R>
void decode_rows(const T* query, T* result, const T* keys, const T* values, const Pages& pages, int64_t length,
                 int64_t dim, float scale) {
  float* wide_query = static_cast<float*>(scratch(0, size_t(R * (2 * dim + KEY_CHUNK) + 16 * dim) * sizeof(float)));
  float *out = wide_query + R * dim, *scores = out + R * dim, *columns = scores + R * KEY_CHUNK;
  const T* value[KEY_CHUNK];
  for (int64_t i = 0; i < R * dim; ++i) wide_query[i] = widen(query[i]), out[i] = 0.0f;
  float top[R], sums[R] = {};
  for (int r = 0; r < R; ++r) top[r] = LOWEST;
  for (int64_t chunk = 0; chunk < length; chunk += KEY_CHUNK) {
    int64_t count = length - chunk < KEY_CHUNK ? length - chunk : KEY_CHUNK;
    Vec best[R];
    for (int r = 0; r < R; ++r) best[r] = splat(top[r]);
    for (int64_t j = 0; j < count; j += 16) {
      int64_t offset = pages.offset(chunk + j);
      prefetch(values + offset, pages.row_stride, dim);
      if (chunk + j + 16 < length) prefetch(keys + pages.offset(chunk + j + 16), pages.row_stride, dim);
      for (int i = 0; i < 16; ++i) value[j + i] = values + offset + i * pages.row_stride;
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) {
        if constexpr (IN_PAIRS<E> || sizeof(T) == 4) {
          transpose(keys + offset + d, pages.row_stride * sizeof(T), columns + d * sizeof(T) * 4);
        } else {  // bf16 without tile registers: as fp32
          float square[256];
          for (int64_t part = 0; part < 32 && d + part < dim; part += 16) {
            for (int i = 0; i < 16; ++i) store(square + 16 * i, load(keys + offset + i * pages.row_stride + d + part));
            transpose(square, 64, columns + (d + part) * 16);
          }
        }
      }
      score<E, T, R>(columns, wide_query, dim, scale, scores + j);
      const IntVec lane = lane_numbers();
      for (int r = 0; r < R; ++r) {
        Vec s = load(scores + r * KEY_CHUNK + j);
        if (j + 16 > count) {
          s = choose(lane < int32_t(count - j), s, splat(LOWEST));
          store(scores + r * KEY_CHUNK + j, s);
        }
        best[r] = maximum(best[r], s);
      }
    }
    for (int r = 0; r < R; ++r) {
      float old = top[r], *row = scores + r * KEY_CHUNK;
      top[r] = highest(best[r]);
      if (chunk) {
        float shrink = exponential(splat(old - top[r]))[0];
        sums[r] *= shrink;
        for (int64_t d = 0; d < dim; d += 16) store(out + r * dim + d, load(out + r * dim + d) * shrink);
      }
      for (int64_t j = 0; j < count; j += 16) store(row + j, exponential(load(row + j) - top[r]));
    }
    for (int64_t j = 0; j < count; ++j)
      for (int r = 0; r < R; ++r) sums[r] += scores[r * KEY_CHUNK + j];
    if constexpr (IN_PAIRS<E>)
      for (int r = 0; r < R; ++r)
        for (int64_t j = 0; j < count; j += 16) {
          float* cell = scores + r * KEY_CHUNK + j;
          store(cell, rounded<BFloat16>(load(cell)));
        }
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) {
      gather_values<E, T, R, 2>(value, count, scores, out + d, dim);
      for (int64_t j = 0; j < count; ++j) value[j] += 32;
    }
    if (d < dim) gather_values<E, T, R, 1>(value, count, scores, out + d, dim);
  }
  for (int r = 0; r < R; ++r) {
    float inverse = 1.0f / sums[r];
    for (int64_t d = 0; d < dim; d += 16) store(result + r * dim + d, load(out + r * dim + d) * inverse);
  }
}

// query, result: [groups, dim]; keys, values: the cache, moved to this key head.
template <class E, class T>
void decode(const T* query, T* result, int64_t groups, const T* keys, const T* values, const Pages& pages,
            int64_t length, int64_t dim, float scale) {
  for (int64_t row = 0; row < groups;) {
    const T* q = query + row * dim;
    T* o = result + row * dim;
    if (groups - row >= 4)
      decode_rows<E, T, 4>(q, o, keys, values, pages, length, dim, scale), row += 4;
    else if (groups - row >= 2)
      decode_rows<E, T, 2>(q, o, keys, values, pages, length, dim, scale), row += 2;
    else
      decode_rows<E, T, 1>(q, o, keys, values, pages, length, dim, scale), row += 1;
  }
}

}  // namespace liaoyuan

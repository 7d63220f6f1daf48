// One layer of a dense decoder over a paged cache (decoder_layer.cpp): what it reads and writes.
#pragma once
#include <utility>

#include "kernels.h"

namespace liaoyuan {

template <class T>
struct Projection {
  const T *weight, *bias;     // [columns, depth], null if it has few bits; [columns] or null
  QuantisedWeights few = {};  // those bits
  int64_t group = 0, groups = 0;
};
template <class T>
struct LayerWeights {
  const T *input_norm, *query_norm, *key_norm, *post_norm;  // the two in the middle may be null
  Projection<T> qkv, output, gate_up, down;
  const float* sinks;  // [query_heads] or null
};
template <class T>
struct LayerPages {
  T *keys, *values;
  const int64_t* slots;
  const int32_t *tables, *starts, *lengths;
};
struct LayerShape {
  int64_t rows, hidden, intermediate;
  float eps;
  PagedShape attention;
  int64_t queries() const { return attention.query_heads * attention.dim; }
  int64_t keys() const { return attention.key_heads * attention.dim; }
  int64_t merged() const { return queries() + 2 * keys(); }
};

// residual [rows, hidden]; x, the last addend to it, or null. total: the stream after attention; out: its next addend.
template <class T>
void decoder_layer(const T* residual, const T* x, const float* cosine, const float* sine, const LayerPages<T>& pages,
                   const LayerWeights<T>& weights, T* total, T* out, const LayerShape& shape);

}  // namespace liaoyuan

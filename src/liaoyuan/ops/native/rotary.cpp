// Split the merged projection, normalise query and key per head, rotate: one read and one write of each element.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 16384;
constexpr int MAX_DIM = 512;  // the binding refuses more

struct Head {  // one head in fp32, padded with zeros to whole vectors
  alignas(64) float x[MAX_DIM + LANES];
};

template <class T>
inline void widen_head(const T* from, Head& head, int64_t dim) {
  for (int64_t i = 0; i < dim; i += LANES) store(head.x + i, load(from + i, dim - i));
}

inline float inverse_rms(const Head& head, int64_t dim, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < dim; i += LANES) squares += load(head.x + i) * load(head.x + i);
  return 1.0f / __builtin_sqrtf(sum(squares) / float(dim) + eps);
}

// Rotate the halves by the angle, or back if direction is -1.
template <class T>
inline void rotate(const Head& head, const float* cosine, const float* sine, float direction, T* to, int64_t dim) {
  int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    Vec c = load(cosine + i, half - i), s = load(sine + i, half - i) * direction;
    Vec first = load(head.x + i, half - i), second = load(head.x + half + i, half - i);
    store(to + i, first * c - second * s, half - i);
    store(to + half + i, second * c + first * s, half - i);
  }
}

template <class T>
inline void forward_head(const T* from, const float* cosine, const float* sine, const T* norm, T* to, int64_t dim,
                         float eps) {
  Head head;
  widen_head(from, head, dim);
  if (norm) {
    Vec scale = splat(inverse_rms(head, dim, eps));
    for (int64_t i = 0; i < dim; i += LANES) store(head.x + i, load(head.x + i) * scale * load(norm + i, dim - i));
  }
  rotate(head, cosine, sine, 1.0f, to, dim);
}

template <class T>
inline void backward_head(const T* grad, const T* from, const float* cosine, const float* sine, const T* norm, T* to,
                          float* grad_norm, int64_t dim, float eps) {
  Head upper, back;
  widen_head(grad, upper, dim);
  if (!norm) return rotate(upper, cosine, sine, -1.0f, to, dim);
  rotate(upper, cosine, sine, -1.0f, back.x, dim);
  for (int64_t i = dim; i % LANES; ++i) back.x[i] = 0.0f;
  Head x;
  widen_head(from, x, dim);
  Vec product{};
  for (int64_t i = 0; i < dim; i += LANES) product += load(x.x + i) * load(back.x + i) * load(norm + i, dim - i);
  float scale = inverse_rms(x, dim, eps);
  Vec r = splat(scale), inner = splat(sum(product) * scale * scale / float(dim));
  for (int64_t i = 0; i < dim; i += LANES) {
    Vec g = load(back.x + i), v = load(x.x + i);
    store(to + i, r * (g * load(norm + i, dim - i) - v * inner), dim - i);
    store(grad_norm + i, load(grad_norm + i) + g * v * r);
  }
}

int64_t rows_per_task(const RotaryShape& s) {
  return std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(s.key_heads * (s.groups + 2) * s.dim, 1));
}

}  // namespace

template <class T>
void split_rotary(const T* qkv, const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* query,
                  T* key, T* value, RotaryShape s) {
  int64_t step = rows_per_task(s), half = s.dim / 2;
  parallel((s.rows + step - 1) / step, [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(s.rows, (task + 1) * step); ++row) {
      const float *c = cosine + row * half, *n = sine + row * half;
      for (int64_t h = 0; h < s.key_heads; ++h) {
        const T* from = qkv + (row * s.key_heads + h) * (s.groups + 2) * s.dim;
        for (int64_t g = 0; g < s.groups; ++g)
          forward_head(from + g * s.dim, c, n, query_norm, query + ((row * s.key_heads + h) * s.groups + g) * s.dim,
                       s.dim, s.eps);
        forward_head(from + s.groups * s.dim, c, n, key_norm, key + (row * s.key_heads + h) * s.dim, s.dim, s.eps);
        std::memcpy(value + (row * s.key_heads + h) * s.dim, from + (s.groups + 1) * s.dim, size_t(s.dim) * sizeof(T));
      }
    }
  });
}

template <class T>
void split_rotary_backward(const T* grad_query, const T* grad_key, const T* grad_value, const T* qkv,
                           const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* grad_qkv,
                           T* grad_query_norm, T* grad_key_norm, RotaryShape s) {
  int64_t step = std::max(rows_per_task(s), (s.rows + 63) / 64), tasks = (s.rows + step - 1) / step;
  int64_t half = s.dim / 2, padded = (s.dim + LANES - 1) / LANES * LANES;
  std::vector<float> partial(size_t(std::max<int64_t>(tasks, 1) * 2 * padded), 0.0f);
  parallel(tasks, [&](int64_t task) {
    float *query_sums = partial.data() + task * 2 * padded, *key_sums = query_sums + padded;
    for (int64_t row = task * step; row < std::min(s.rows, (task + 1) * step); ++row) {
      const float *c = cosine + row * half, *n = sine + row * half;
      for (int64_t h = 0; h < s.key_heads; ++h) {
        int64_t at = (row * s.key_heads + h) * (s.groups + 2) * s.dim;
        for (int64_t g = 0; g < s.groups; ++g)
          backward_head(grad_query + ((row * s.key_heads + h) * s.groups + g) * s.dim, qkv + at + g * s.dim, c, n,
                        query_norm, grad_qkv + at + g * s.dim, query_sums, s.dim, s.eps);
        int64_t key_at = at + s.groups * s.dim;
        backward_head(grad_key + (row * s.key_heads + h) * s.dim, qkv + key_at, c, n, key_norm, grad_qkv + key_at,
                      key_sums, s.dim, s.eps);
        std::memcpy(grad_qkv + key_at + s.dim, grad_value + (row * s.key_heads + h) * s.dim,
                    size_t(s.dim) * sizeof(T));
      }
    }
  });
  if (!query_norm) return;
  for (int64_t i = 0; i < s.dim; i += LANES) {
    Vec query_sum{}, key_sum{};
    for (int64_t task = 0; task < tasks; ++task) {
      query_sum += load(partial.data() + task * 2 * padded + i);
      key_sum += load(partial.data() + task * 2 * padded + padded + i);
    }
    store(grad_query_norm + i, query_sum, s.dim - i);
    store(grad_key_norm + i, key_sum, s.dim - i);
  }
}

#define INSTANTIATE(T)                                                                                               \
  template void split_rotary<T>(const T*, const float*, const float*, const T*, const T*, T*, T*, T*, RotaryShape);   \
  template void split_rotary_backward<T>(const T*, const T*, const T*, const T*, const float*, const float*,         \
                                         const T*, const T*, T*, T*, T*, RotaryShape);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

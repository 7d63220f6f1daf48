// Split the merged projection, normalise query and key per head, rotate.
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "rotation.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 16384;

// Weights of a norm as fp32, laid out as the heads are; empty: no norm.
template <class T>
std::vector<float> widened(const T* norm, const HeadLayout& layout) {
  if (!norm) return {};
  std::vector<float> result(size_t(2 * layout.room), 0.0f);
  for (int64_t i = 0; i < layout.half; ++i) {
    result[i] = widen(norm[i]);
    result[layout.room + i] = widen(norm[layout.half + i]);
  }
  return result;
}

// `sum` of vector.h, added in the same order, without a way through memory; and two of them at once.
#ifdef __AVX512F__
inline float sum_of_lanes(Vec v) {
  __m512 x = (__m512)v;
  __m256 eight = _mm512_castps512_ps256(x) + _mm512_castps512_ps256(_mm512_shuffle_f32x4(x, x, 0xee));
  __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}
inline void sum_both(Vec a, Vec b, float& sum_a, float& sum_b) {
  __m512 x = (__m512)a, y = (__m512)b;
  __m512 eights = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
  __m512 fours = eights + _mm512_shuffle_f32x4(eights, eights, 0xb1);
  __m512 twos = fours + _mm512_permute_ps(fours, 0x4e), ones = twos + _mm512_permute_ps(twos, 0xb1);
  sum_a = _mm512_cvtss_f32(ones);
  sum_b = _mm256_cvtss_f32(_mm512_castps512_ps256(_mm512_shuffle_f32x4(ones, ones, 0xee)));
}
#else
inline float sum_of_lanes(Vec v) { return sum(v); }
inline void sum_both(Vec a, Vec b, float& sum_a, float& sum_b) {
  sum_a = sum(a);
  sum_b = sum(b);
}
#endif

template <class T>
inline float square_sum_of(const T* head, int64_t room) {
  Vec squares{};
  for (int64_t i = 0; i < 2 * room; i += LANES) squares += load(head + i) * load(head + i);
  return sum_of_lanes(squares);
}

// Sums of squares become factors that make heads' root mean squares one: all heads of a row at once, by vectors.
void to_scales(float* sums, int64_t count, int64_t dim, float eps) {
  for (int64_t i = 0; i < count; ++i) sums[i] = 1.0f / __builtin_sqrtf(sums[i] / float(dim) + eps);
}

template <class T>
inline void turn_normed(const T* from, const Angle& angle, const float* norm, float scale, T* to, int64_t room) {
  Vec factor = splat(scale);
  for (int64_t i = 0; i < room; i += LANES) {
    Vec first = load(from + i) * factor * load(norm + i);
    Vec second = load(from + room + i) * factor * load(norm + room + i);
    Turned t = turned<1>(first, second, angle, i);
    store_apart(to + i, t.first, to + room + i, t.second);
  }
}

// Sums of a head's backward pass: of its squares, and of gradient * weight * x.
template <class T>
inline void sums_of(const T* grad, const T* x, const Angle& angle, const float* norm, int64_t room, float& squares,
                    float& products) {
  Vec squared{}, multiplied{};
  for (int64_t i = 0; i < room; i += LANES) {
    Turned g = turned<-1>(load(grad + i), load(grad + room + i), angle, i);
    Vec first = load(x + i), second = load(x + room + i);
    squared += first * first;
    squared += second * second;
    multiplied += g.first * load(norm + i) * first;
    multiplied += g.second * load(norm + room + i) * second;
  }
  sum_both(squared, multiplied, squares, products);
}

// The rotation is done again: that takes less time than to keep its result.
template <class T>
inline void backward_normed(const T* grad, const T* x, const Angle& angle, const float* norm, float scale, float inner,
                            T* to, float* grad_norm, int64_t room) {
  Vec r = splat(scale), shift = splat(inner);
  for (int64_t i = 0; i < room; i += LANES) {
    Turned g = turned<-1>(load(grad + i), load(grad + room + i), angle, i);
    Vec first = load(x + i), second = load(x + room + i);
    store(grad_norm + i, load(grad_norm + i) + g.first * first * r);
    store(grad_norm + room + i, load(grad_norm + room + i) + g.second * second * r);
    store_apart(to + i, g.first * load(norm + i) * r - first * shift, to + room + i,
                g.second * load(norm + room + i) * r - second * shift);
  }
}

int64_t rows_per_task(const RotaryShape& s) {
  return std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(s.key_heads * (s.groups + 2) * s.dim, 1));
}

// A head that is turned: its place in a row of the merged projection, and in one of queries or keys.
struct Head {
  int64_t merged, apart;
  bool is_query;
};

std::vector<Head> heads_of(const RotaryShape& s) {
  std::vector<Head> heads;
  for (int64_t h = 0; h < s.key_heads; ++h) {
    int64_t first = h * (s.groups + 2) * s.dim;
    for (int64_t g = 0; g < s.groups; ++g) heads.push_back({first + g * s.dim, (h * s.groups + g) * s.dim, true});
    heads.push_back({first + s.groups * s.dim, h * s.dim, false});
  }
  return heads;
}

// A row of queries, keys and values.
template <class T>
struct Apart {
  T *query, *key, *value;

  Apart row(int64_t i, const RotaryShape& s) const {
    int64_t keys = i * s.key_heads * s.dim;
    return {query + keys * s.groups, key + keys, value + keys};
  }
  T* of(const Head& head) const { return (head.is_query ? query : key) + head.apart; }
};

// Weights of the norms of queries and keys, laid out as heads are; empty: there are none.
struct Norms {
  std::vector<float> query, key;

  template <class T>
  Norms(const T* query_norm, const T* key_norm, const HeadLayout& layout)
      : query(widened(query_norm, layout)), key(widened(key_norm, layout)) {}
  explicit operator bool() const { return !query.empty(); }
  const float* of(const Head& head) const { return (head.is_query ? query : key).data(); }
};

template <class T>
void forward_row(const T* qkv, const Angle& angle, const std::vector<Head>& heads, const Norms& norms,
                 const Apart<T>& to, float* scales, const RotaryShape& s, const HeadLayout& layout) {
  T space[MAX_ROOM], result[MAX_ROOM];
  if (norms) {
    for (size_t n = 0; n < heads.size(); ++n)
      scales[n] = square_sum_of(layout.laid_out(qkv + heads[n].merged, space), layout.room);
    to_scales(scales, heads.size(), s.dim, s.eps);
  }
  for (size_t n = 0; n < heads.size(); ++n) {
    T* head = to.of(heads[n]);
    if (!norms) {
      turn_head<1>(qkv + heads[n].merged, angle, head, layout);
      continue;
    }
    T* turned = layout.is_dense() ? head : result;
    turn_normed(layout.laid_out(qkv + heads[n].merged, space), angle, norms.of(heads[n]), scales[n], turned,
                layout.room);
    layout.bring_back(turned, head);
  }
  for (int64_t h = 0; h < s.key_heads; ++h)
    copy(qkv + (h * (s.groups + 2) + s.groups + 1) * s.dim, to.value + h * s.dim, s.dim);
}

constexpr size_t WINDOW = LANES;  // heads whose sums are taken before the first needs its own, so that none waits

// grad_norms: sums of the two norms' gradients, laid out as heads are.
template <class T>
void backward_normed_row(const Apart<const T>& grads, const T* qkv, const Angle& angle, const std::vector<Head>& heads,
                         const Norms& norms, T* grad_qkv, float* grad_norms, const RotaryShape& s,
                         const HeadLayout& layout) {
  T space[MAX_ROOM], grad_space[MAX_ROOM], result[MAX_ROOM];
  float scales[WINDOW] = {}, inner[WINDOW] = {};
  for (size_t first = 0; first < heads.size(); first += WINDOW) {
    size_t count = std::min(WINDOW, heads.size() - first);
    for (size_t n = 0; n < count; ++n) {
      const Head& head = heads[first + n];
      sums_of(layout.laid_out(grads.of(head), grad_space), layout.laid_out(qkv + head.merged, space), angle,
              norms.of(head), layout.room, scales[n], inner[n]);
    }
    to_scales(scales, WINDOW, s.dim, s.eps);
    for (size_t n = 0; n < WINDOW; ++n) inner[n] *= scales[n] * scales[n] * scales[n] / float(s.dim);
    for (size_t n = 0; n < count; ++n) {
      const Head& head = heads[first + n];
      T* turned = layout.is_dense() ? grad_qkv + head.merged : result;
      backward_normed(layout.laid_out(grads.of(head), grad_space), layout.laid_out(qkv + head.merged, space), angle,
                      norms.of(head), scales[n], inner[n], turned, grad_norms + (head.is_query ? 0 : 2 * layout.room),
                      layout.room);
      layout.bring_back(turned, grad_qkv + head.merged);
    }
  }
}

template <class T>
void backward_row(const Apart<const T>& grads, const T* qkv, const Angle& angle, const std::vector<Head>& heads,
                  const Norms& norms, T* grad_qkv, float* grad_norms, const RotaryShape& s, const HeadLayout& layout) {
  if (norms)
    backward_normed_row(grads, qkv, angle, heads, norms, grad_qkv, grad_norms, s, layout);
  else
    for (const Head& head : heads) turn_head<-1>(grads.of(head), angle, grad_qkv + head.merged, layout);
  for (int64_t h = 0; h < s.key_heads; ++h)
    copy(grads.value + h * s.dim, grad_qkv + (h * (s.groups + 2) + s.groups + 1) * s.dim, s.dim);
}

// The norms' gradients of all tasks, in order, as they lie in memory.
template <class T>
void add_up(const std::vector<float>& partial, int64_t tasks, const HeadLayout& layout, T* grad_query_norm,
            T* grad_key_norm) {
  int64_t size = 4 * layout.room;
  for (int64_t i = 0; i < size; i += LANES) {
    Vec total{};
    for (int64_t task = 0; task < tasks; ++task) total += load(partial.data() + task * size + i);
    T* norm = i < 2 * layout.room ? grad_query_norm : grad_key_norm;
    int64_t place = i % (2 * layout.room), inside = place % layout.room;
    store(norm + (place < layout.room ? 0 : layout.half) + inside, total, layout.half - inside);
  }
}

}  // namespace

template <class T>
void split_rotary(const T* qkv, const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* query,
                  T* key, T* value, RotaryShape s) {
  HeadLayout layout(s.dim);
  Norms norms(query_norm, key_norm, layout);
  std::vector<Head> heads = heads_of(s);
  int64_t step = rows_per_task(s), width = s.key_heads * (s.groups + 2) * s.dim;
  parallel((s.rows + step - 1) / step, [&](int64_t task) {
    std::vector<float> scales(heads.size());
    float angles[MAX_ROOM];
    for (int64_t row = task * step; row < std::min(s.rows, (task + 1) * step); ++row)
      forward_row(qkv + row * width, laid_out(layout, cosine + row * layout.half, sine + row * layout.half, angles),
                  heads, norms, Apart<T>{query, key, value}.row(row, s), scales.data(), s, layout);
  });
}

template <class T>
void split_rotary_backward(const T* grad_query, const T* grad_key, const T* grad_value, const T* qkv,
                           const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* grad_qkv,
                           T* grad_query_norm, T* grad_key_norm, RotaryShape s) {
  HeadLayout layout(s.dim);
  Norms norms(query_norm, key_norm, layout);
  std::vector<Head> heads = heads_of(s);
  int64_t step = std::max(rows_per_task(s), (s.rows + 63) / 64), tasks = (s.rows + step - 1) / step;
  int64_t width = s.key_heads * (s.groups + 2) * s.dim, sums = norms ? 4 * layout.room : 0;
  std::vector<float> partial(size_t(tasks * sums), 0.0f);
  parallel(tasks, [&](int64_t task) {
    float angles[MAX_ROOM];
    for (int64_t row = task * step; row < std::min(s.rows, (task + 1) * step); ++row)
      backward_row(Apart<const T>{grad_query, grad_key, grad_value}.row(row, s), qkv + row * width,
                   laid_out(layout, cosine + row * layout.half, sine + row * layout.half, angles), heads, norms,
                   grad_qkv + row * width, partial.data() + task * sums, s, layout);
  });
  if (norms) add_up(partial, tasks, layout, grad_query_norm, grad_key_norm);
}

#define INSTANTIATE(T)                                                                                               \
  template void split_rotary<T>(const T*, const float*, const float*, const T*, const T*, T*, T*, T*, RotaryShape);   \
  template void split_rotary_backward<T>(const T*, const T*, const T*, const T*, const float*, const float*,         \
                                         const T*, const T*, T*, T*, T*, RotaryShape);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

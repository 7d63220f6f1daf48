// Heads of latent attention: rotate the last part of each query, and the key's, which all heads share; lay keys and
// values out.
#include <algorithm>

#include "rotation.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 16384;

// body(row, its angles), rows dealt out to tasks.
template <class Body>
void over_rows(const LatentShape& s, const HeadLayout& layout, const float* cosine, const float* sine,
               const Body& body) {
  int64_t width = s.heads * (2 * (s.own + s.turned) + s.value_dim);
  int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / width);
  parallel((s.rows + step - 1) / step, [&](int64_t task) {
    float angles[MAX_ROOM];
    for (int64_t row = task * step; row < std::min(s.rows, (task + 1) * step); ++row)
      body(row, laid_out(layout, cosine + row * layout.half, sine + row * layout.half, angles));
  });
}

// The queries of a row: forward, or their gradients on the way back.
template <int direction, class T>
void turn_queries(const T* from, const Angle& angle, T* to, const LatentShape& s, const HeadLayout& layout) {
  for (int64_t h = 0; h < s.heads; ++h, from += s.own + s.turned, to += s.own + s.turned) {
    copy(from, to, s.own);
    turn_head<direction>(from + s.own, angle, to + s.own, layout);
  }
}

// The gradient of the shared part of a row's keys: the sum over heads, turned back.
template <class T>
void shared_gradient(const T* grad_key, const Angle& angle, T* grad_shared, const LatentShape& s,
                     const HeadLayout& layout) {
  float sums[MAX_ROOM] = {};
  for (int64_t h = 0; h < s.heads; ++h) {
    const T* part = grad_key + h * (s.own + s.turned) + s.own;
    for (int64_t i = 0; i < layout.half; i += LANES) {
      store(sums + i, load(sums + i) + load(part + i, layout.half - i));
      float* second = sums + layout.room + i;
      store(second, load(second) + load(part + layout.half + i, layout.half - i));
    }
  }
  T result[MAX_ROOM];
  turn<-1>(sums, angle, result, layout.room);
  layout.bring_back(result, grad_shared);
}

}  // namespace

template <class T>
void latent_rotary(const T* query, const T* expanded, const T* shared, const float* cosine, const float* sine,
                   T* turned_query, T* key, T* value, const LatentShape& s) {
  HeadLayout layout(s.turned);
  int64_t dim = s.own + s.turned, width = s.own + s.value_dim;
  over_rows(s, layout, cosine, sine, [&](int64_t row, const Angle& angle) {
    turn_queries<1>(query + row * s.heads * dim, angle, turned_query + row * s.heads * dim, s, layout);
    T part[MAX_DIM];
    turn_head<1>(shared + row * s.turned, angle, part, layout);
    for (int64_t head = row * s.heads; head < (row + 1) * s.heads; ++head) {
      copy(expanded + head * width, key + head * dim, s.own);
      copy(part, key + head * dim + s.own, s.turned);
      copy(expanded + head * width + s.own, value + head * s.value_dim, s.value_dim);
    }
  });
}

template <class T>
void latent_rotary_backward(const T* grad_query, const T* grad_key, const T* grad_value, const float* cosine,
                            const float* sine, T* grad_unturned, T* grad_expanded, T* grad_shared,
                            const LatentShape& s) {
  HeadLayout layout(s.turned);
  int64_t dim = s.own + s.turned, width = s.own + s.value_dim;
  over_rows(s, layout, cosine, sine, [&](int64_t row, const Angle& angle) {
    turn_queries<-1>(grad_query + row * s.heads * dim, angle, grad_unturned + row * s.heads * dim, s, layout);
    shared_gradient(grad_key + row * s.heads * dim, angle, grad_shared + row * s.turned, s, layout);
    for (int64_t head = row * s.heads; head < (row + 1) * s.heads; ++head) {
      copy(grad_key + head * dim, grad_expanded + head * width, s.own);
      copy(grad_value + head * s.value_dim, grad_expanded + head * width + s.own, s.value_dim);
    }
  });
}

#define INSTANTIATE(T)                                                                                            \
  template void latent_rotary<T>(const T*, const T*, const T*, const float*, const float*, T*, T*, T*,            \
                                 const LatentShape&);                                                             \
  template void latent_rotary_backward<T>(const T*, const T*, const T*, const float*, const float*, T*, T*, T*,   \
                                          const LatentShape&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

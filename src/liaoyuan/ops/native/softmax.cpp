// The passes over a chunk of logits that token_log_prob needs around its matrix products, and the cache scatter.
#include <algorithm>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 32768;

template <class Body>
void over_rows(int64_t rows, int64_t columns, const Body& body) {
  int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(columns, 1));
  parallel((rows + step - 1) / step, [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) body(row);
  });
}

}  // namespace

template <class T>
void log_sum_exp_chunk(const T* logits, const int64_t* targets, float* state, int64_t rows, int64_t columns,
                       int64_t first) {
  over_rows(rows, columns, [&](int64_t row) {
    const T* x = logits + row * columns;
    int64_t whole = columns / LANES * LANES;
    Vec tops = splat(-3.4e38f);
    for (int64_t i = 0; i < whole; i += LANES) tops = maximum(tops, load(x + i));
    float top = highest(tops);
    for (int64_t i = whole; i < columns; ++i) top = std::max(top, widen(x[i]));
    float *running = state + row * 3, old = first ? running[0] : top;
    top = std::max(top, old);
    Vec sums{};
    for (int64_t i = 0; i < columns; i += LANES) {
      Vec value = load(x + i, columns - i);
      if (columns - i < LANES) {  // lanes past the end must not count
        float lane[LANES];
        store(lane, value);
        for (int64_t k = columns - i; k < LANES; ++k) lane[k] = -3.4e38f;
        value = load(lane);
      }
      sums += exponential(value - splat(top));
    }
    float before = first ? running[1] * sum(exponential(splat(old - top))) / LANES : 0.0f;
    int64_t target = targets[row] - first;
    running[0] = top;
    running[1] = before + sum(sums);
    if (target >= 0 && target < columns) running[2] = widen(x[target]);
  });
}

template <class T>
void softmax_gradient_chunk(T* logits, const int64_t* targets, const float* log_sum_exp, const float* grad,
                            int64_t rows, int64_t columns, int64_t first) {
  over_rows(rows, columns, [&](int64_t row) {
    T* x = logits + row * columns;
    Vec shift = splat(log_sum_exp[row]), factor = splat(-grad[row]);
    int64_t target = targets[row] - first;
    bool here = target >= 0 && target < columns;
    T at_target[LANES];
    if (here) store(at_target, (1.0f - exponential(splat(widen(x[target])) - shift)) * grad[row]);
    for (int64_t i = 0; i < columns; i += LANES)
      store(x + i, exponential(load(x + i, columns - i) - shift) * factor, columns - i);
    if (here) x[target] = at_target[0];
  });
}

void write_cache(const char* from, char* cache, const int64_t* slots, int64_t rows, int64_t row_bytes) {
  over_rows(rows, row_bytes, [&](int64_t row) {
    if (slots[row] >= 0) std::memcpy(cache + slots[row] * row_bytes, from + row * row_bytes, size_t(row_bytes));
  });
}

#define INSTANTIATE(T)                                                                                     \
  template void log_sum_exp_chunk<T>(const T*, const int64_t*, float*, int64_t, int64_t, int64_t);          \
  template void softmax_gradient_chunk<T>(T*, const int64_t*, const float*, const float*, int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

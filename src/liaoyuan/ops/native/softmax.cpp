// The passes over a chunk of logits that the loss head needs around its matrix products, and the cache scatter.
#include <algorithm>

#include "denominator.h"
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

template <class T, bool MOMENTS>
void read_row(const T* x, int64_t target, LogitState& state, int64_t columns) {
  Denominator& row = state.denominator;
  const Vec lowest = splat(std::numeric_limits<float>::lowest());
  Vec logits{};
  over_blocks(x, columns, [&](int64_t, auto score) {
    Vec products{};
    float before = row.top;
    double factor = row.rise(highest_of_block(score));
    if constexpr (MOMENTS)
      if (row.sum > 0) state.product = factor * state.product + (double(before) - row.top) * row.sum;
    row.sum += sum_of_block(score, row.top, [&](const Two& below, const Two& powers) {
      if constexpr (MOMENTS) {  // zero past the end: zero times a finite number
        products += powers.first * maximum(below.first, lowest);
        products += powers.second * maximum(below.second, lowest);
      }
    }, [](auto&&...) {});
    if constexpr (MOMENTS) state.product += sum(products);
  });
  if constexpr (MOMENTS) {
    for (int64_t i = 0; i < columns; i += LANES) logits += load(x + i, columns - i);
    state.logits += sum(logits);
  }
  if (target >= 0 && target < columns) state.chosen = widen(x[target]);
}

template <class T>
void read_logits(const LogitChunk<const T>& chunk, const int64_t* targets, LogitState* state, bool moments) {
  over_rows(chunk.rows, chunk.columns, [&](int64_t row) {
    (moments ? read_row<T, true> : read_row<T, false>)(chunk.logits + row * chunk.stride, targets[row] - chunk.first,
                                                       state[row], chunk.columns);
  });
}

template <class T>
void log_sum_exp(const T* logits, float* out, int64_t rows, int64_t columns) {
  over_rows(rows, columns, [&](int64_t row) {
    LogitState state;
    read_row<T, false>(logits + row * columns, -1, state, columns);
    out[row] = state.denominator.log();
  });
}

template <class T, bool MOMENTS>
void gradient_row(const T* x, T* out, int64_t target, const LogitGradient& grad, int64_t columns) {
  Vec shift = splat(grad.log_sum_exp), factor = splat(grad.of_sum), slope = splat(grad.slope), every = splat(grad.every);
  auto gradient = [&](Vec logits) {
    Vec below = logits - shift, one = power(below);
    if constexpr (MOMENTS) return one * (factor + below * slope) + every;
    return one * factor;
  };
  bool here = target >= 0 && target < columns;
  T at_target[LANES];
  if (here) store(at_target, gradient(splat(widen(x[target]))) + grad.chosen);
  for (int64_t i = 0; i < columns; i += LANES) store(out + i, gradient(load(x + i, columns - i)), columns - i);
  if (here) out[target] = at_target[0];
}

template <class T>
void logit_gradients(const LogitChunk<const T>& chunk, T* out, const int64_t* targets, const LogitGradient* grads,
                     bool moments) {
  over_rows(chunk.rows, chunk.columns, [&](int64_t row) {
    (moments ? gradient_row<T, true> : gradient_row<T, false>)(chunk.logits + row * chunk.stride,
                                                               out + row * chunk.columns, targets[row] - chunk.first,
                                                               grads[row], chunk.columns);
  });
}

template <class T>
void add_part(const T* part, float* total, T* out, int64_t count, bool begin, bool end) {
  over_rows(count / LANES + 1, LANES, [&](int64_t row) {
    int64_t i = row * LANES, left = count - i;
    if (left <= 0) return;
    Vec value = load(part + i, left);
    if (!begin) value += load(total + i, left);
    if (end)
      store(out + i, value, left);
    else
      store(total + i, value, left);
  });
}

void write_cache(const char* from, char* cache, const int64_t* slots, int64_t rows, int64_t row_bytes) {
  over_rows(rows, row_bytes, [&](int64_t row) {
    if (slots[row] >= 0) std::memcpy(cache + slots[row] * row_bytes, from + row * row_bytes, size_t(row_bytes));
  });
}

#define INSTANTIATE(T)                                                                                            \
  template void read_logits<T>(const LogitChunk<const T>&, const int64_t*, LogitState*, bool);                    \
  template void log_sum_exp<T>(const T*, float*, int64_t, int64_t);                                               \
  template void logit_gradients<T>(const LogitChunk<const T>&, T*, const int64_t*, const LogitGradient*, bool);   \
  template void add_part<T>(const T*, float*, T*, int64_t, bool, bool);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

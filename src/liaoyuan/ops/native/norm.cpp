// RMSNorm, alone and joined with the residual addition; forward and backward in one pass over memory each.
#include <algorithm>

#include "kernels.h"
#include "stream.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 32768;

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(width, 1)); }

float inverse_root(float squares, int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(squares / float(width) + eps);
}

// Of 64 elements at a time, since one addition takes as long as four; the order depends on the width alone.
template <class T>
float square_sum_of(const T* x, int64_t width, T* to) {
  Two even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * TWO <= width; i += 2 * TWO) {
    ask_to_write(to + i);
    ask_to_write(to + i + TWO);
    Two v = load_two(x + i), next = load_two(x + i + TWO);
    even += v * v;
    odd += next * next;
  }
  over_row(width - i, [&](int64_t at, auto count) {
    Two v = load_two(x + i + at, count);
    even += v * v;
  });
  return sum(even + odd);
}

template <class T>
void add(const T* a, const T* b, T* total, int64_t width) {
  over_row(width, [&](int64_t i, auto count) {
    store_two(total + i, load_two(a + i, count) + load_two(b + i, count), count);
  });
}

}  // namespace

template <class T>
void rms_norm(const T* residual, const T* x, const T* weight, T* total, T* out, int64_t rows, int64_t width, float eps) {
  int64_t step = rows_per_task(width);
  parallel((rows + step - 1) / step, [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      const T* in = x + row * width;
      if (residual) {
        add(residual + row * width, in, total + row * width, width);
        in = total + row * width;
      }
      T* to = out + row * width;
      Vec scale = splat(inverse_root(square_sum_of(in, width, to), width, eps));
      over_row(width, [&](int64_t i, auto count) {
        if (!residual) ask(in + i + AHEAD / sizeof(T));
        store_two(to + i, load_two(in + i, count) * scale * load_two(weight + i, count), count);
      });
    }
  });
}

namespace {

template <class T>
struct RowGradient {
  const T *grad_total, *grad, *x;
  T* grad_in;
  Vec scale, inner;

  RowGradient() = default;
  RowGradient(const T* grad_total, const T* grad, const T* x, const T* weight, T* grad_in, int64_t width, float eps)
      : grad_total(grad_total), grad(grad), x(x), grad_in(grad_in) {
    Two squares{}, product{};
    over_row(width, [&](int64_t i, auto count) {
      ask_to_write(grad_in + i);
      Two v = load_two(x + i, count);
      squares += v * v;
      product += v * load_two(grad + i, count) * load_two(weight + i, count);
    });
    float root = inverse_root(sum(squares), width, eps);
    scale = splat(root), inner = splat(sum(product) * root * root / float(width));
  }
};

constexpr int TOGETHER = 4;  // rows, so that the sums of the weight's gradient are loaded and stored once for so many

// The rows' gradients, and what they add to the weight's, row after row.
template <int ROWS, class T>
void rows_backward(const RowGradient<T>* row, const T* weight, float* sums, int64_t width) {
  over_row(width, [&](int64_t i, auto count) {
    Two w = load_two(weight + i, count), total = load_two(sums + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      Two v = load_two(row[r].x + i, count), upper = load_two(row[r].grad + i, count);
      Two result = (upper * w - v * row[r].inner) * row[r].scale;
      if (row[r].grad_total) {
        ask(row[r].grad_total + i + TOGETHER * width);
        result += load_two(row[r].grad_total + i, count);
      }
      store_two(row[r].grad_in + i, result, count);
      total += upper * v * row[r].scale;
      ask(row[r].x + i + TOGETHER * width);
      ask(row[r].grad + i + TOGETHER * width);
    }
    store_two(sums + i, total);
  });
}

}  // namespace

template <class T>
void rms_norm_backward(const T* grad_total, const T* grad, const T* total, const T* weight, T* grad_in, T* grad_weight,
                       int64_t rows, int64_t width, float eps) {
  // The weight's gradient is summed within a task and then over tasks in their order; the cut depends on the shape alone.
  int64_t step = std::max(rows_per_task(width), (rows + 63) / 64), tasks = (rows + step - 1) / step;
  int64_t padded = (width + TWO - 1) / TWO * TWO;
  auto* partial = static_cast<float*>(scratch(0, size_t(std::max<int64_t>(tasks, 1) * padded) * sizeof(float)));
  parallel(tasks, [&](int64_t task) {
    float* sums = partial + task * padded;
    std::fill_n(sums, padded, 0.0f);
    int64_t end = std::min(rows, (task + 1) * step);
    for (int64_t row = task * step; row < end; row += TOGETHER) {
      RowGradient<T> group[TOGETHER];
      int count = int(std::min<int64_t>(TOGETHER, end - row));
      for (int r = 0; r < count; ++r) {
        int64_t at = (row + r) * width;
        group[r] = {grad_total ? grad_total + at : nullptr, grad + at, total + at, weight, grad_in + at, width, eps};
      }
      if (count == TOGETHER)
        rows_backward<TOGETHER>(group, weight, sums, width);
      else
        for (int r = 0; r < count; ++r) rows_backward<1>(group + r, weight, sums, width);
    }
  });
  over_row(width, [&](int64_t i, auto count) {
    Two whole{};
    for (int64_t task = 0; task < tasks; ++task) whole += load_two(partial + task * padded + i);
    store_two(grad_weight + i, whole, count);
  });
}

#define INSTANTIATE(T)                                                                                              \
  template void rms_norm<T>(const T*, const T*, const T*, T*, T*, int64_t, int64_t, float);                          \
  template void rms_norm_backward<T>(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t, float);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

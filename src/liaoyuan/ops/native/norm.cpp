// RMSNorm, alone and joined with the residual addition; forward and backward in one pass over memory each.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 32768;

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(width, 1)); }

template <class T>
float inverse_rms(const T* x, int64_t width, float eps) {
  Vec squares{};
  for (int64_t i = 0; i < width; i += LANES) {
    Vec v = load(x + i, width - i);
    squares += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
}

}  // namespace

template <class T>
void rms_norm(const T* residual, const T* x, const T* weight, T* total, T* out, int64_t rows, int64_t width, float eps) {
  int64_t step = rows_per_task(width);
  parallel((rows + step - 1) / step, [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      const T* in = x + row * width;
      if (residual) {
        for (int64_t i = 0; i < width; i += LANES) {
          Vec v = load(residual + row * width + i, width - i) + load(in + i, width - i);
          store(total + row * width + i, v, width - i);
        }
        in = total + row * width;
      }
      Vec scale = splat(inverse_rms(in, width, eps));
      for (int64_t i = 0; i < width; i += LANES)
        store(out + row * width + i, load(in + i, width - i) * scale * load(weight + i, width - i), width - i);
    }
  });
}

template <class T>
void rms_norm_backward(const T* grad_total, const T* grad, const T* total, const T* weight, T* grad_in, T* grad_weight,
                       int64_t rows, int64_t width, float eps) {
  // The weight's gradient is summed within a task and then over tasks in their order; the cut depends on the shape alone.
  int64_t step = std::max(rows_per_task(width), (rows + 63) / 64), tasks = (rows + step - 1) / step;
  int64_t padded = (width + LANES - 1) / LANES * LANES;
  std::vector<float> partial(size_t(std::max<int64_t>(tasks, 1) * padded), 0.0f);
  parallel(tasks, [&](int64_t task) {
    float* sums = partial.data() + task * padded;
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      const T *x = total + row * width, *g = grad + row * width;
      Vec squares{}, product{};
      for (int64_t i = 0; i < width; i += LANES) {
        Vec v = load(x + i, width - i);
        squares += v * v;
        product += v * load(g + i, width - i) * load(weight + i, width - i);
      }
      float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(width) + eps);
      Vec r = splat(scale), inner = splat(sum(product) * scale * scale / float(width));
      for (int64_t i = 0; i < width; i += LANES) {
        Vec v = load(x + i, width - i), upper = load(g + i, width - i);
        Vec result = r * (upper * load(weight + i, width - i) - v * inner);
        if (grad_total) result += load(grad_total + row * width + i, width - i);
        store(grad_in + row * width + i, result, width - i);
        store(sums + i, load(sums + i) + upper * v * r);
      }
    }
  });
  for (int64_t i = 0; i < width; i += LANES) {
    Vec whole{};
    for (int64_t task = 0; task < tasks; ++task) whole += load(partial.data() + task * padded + i);
    store(grad_weight + i, whole, width - i);
  }
}

#define INSTANTIATE(T)                                                                                              \
  template void rms_norm<T>(const T*, const T*, const T*, T*, T*, int64_t, int64_t, float);                          \
  template void rms_norm_backward<T>(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t, float);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

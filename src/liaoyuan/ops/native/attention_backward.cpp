// Attention backward over packed documents (attend_backward.h), one task for each document and key head.
#include "attend_backward.h"

namespace liaoyuan {

namespace {

template <class E, class T>
void backward(const T* grad, const float* delta, const float* log_sum_exp, const T* query, const T* key, const T* value,
              const int32_t* boundaries, T* grad_query, T* grad_key, T* grad_value, const PackedShape& s) {
  int64_t groups = s.query_heads / s.key_heads;
  parallel(s.documents * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, start = boundaries[task / s.key_heads];
    int64_t length = boundaries[task / s.key_heads + 1] - start, first_head = start * s.query_heads + head * groups;
    if (length == 0) return;
    int64_t query_at = first_head * s.dim, key_at = (start * s.key_heads + head) * s.dim;
    int64_t value_at = (start * s.key_heads + head) * s.value_dim, row_at = head * groups * s.tokens + start;
    Backward<E, T, T, T>{
        .query = query + query_at,
        .key = key + key_at,
        .value = value + value_at,
        .grad = grad + first_head * s.value_dim,
        .delta = delta + row_at,
        .log_sum_exp = log_sum_exp + row_at,
        .grad_query = grad_query + query_at,
        .grad_key = grad_key + key_at,
        .grad_value = grad_value + value_at,
        .query_stride = s.query_heads * s.dim,
        .key_stride = s.key_heads * s.dim,
        .grad_stride = s.query_heads * s.value_dim,
        .value_stride = s.key_heads * s.value_dim,
        .row_stride = 1,
        .head_stride = s.tokens,
        .groups = groups,
        .queries = length,
        .keys = length,
        .ranges = {.window = s.window},
        .scale = s.scale,
        .packing = Packing<E>(s.dim),
        .values = Packing<E>(s.value_dim),
    }
        .run();
  });
}

}  // namespace

template <>
void attention_backward<float>(const float* grad, const float* delta, const float* log_sum_exp, const float* query,
                               const float* key, const float* value, const int32_t* boundaries, float* grad_query,
                               float* grad_key, float* grad_value, PackedShape shape) {
  backward<Wide>(grad, delta, log_sum_exp, query, key, value, boundaries, grad_query, grad_key, grad_value, shape);
}

template <>
void attention_backward<BFloat16>(const BFloat16* grad, const float* delta, const float* log_sum_exp,
                                  const BFloat16* query, const BFloat16* key, const BFloat16* value,
                                  const int32_t* boundaries, BFloat16* grad_query, BFloat16* grad_key,
                                  BFloat16* grad_value, PackedShape shape) {
  with_bf16_engine([&](auto engine) {
    backward<decltype(engine)>(grad, delta, log_sum_exp, query, key, value, boundaries, grad_query, grad_key,
                               grad_value, shape);
  });
}

template <class T>
void attention_delta(const T* grad, const T* out, float* delta, int64_t rows, int64_t heads, int64_t dim) {
  constexpr int64_t ROWS = 64;
  parallel((rows + ROWS - 1) / ROWS, [&](int64_t task) {
    for (int64_t row = task * ROWS; row < std::min(rows, (task + 1) * ROWS); ++row)
      for (int64_t head = 0; head < heads; ++head) {
        int64_t at = (row * heads + head) * dim;
        Vec product{};
        for (int64_t d = 0; d < dim; d += LANES) product += load(grad + at + d, dim - d) * load(out + at + d, dim - d);
        delta[head * rows + row] = sum(product);
      }
  });
}
template void attention_delta<float>(const float*, const float*, float*, int64_t, int64_t, int64_t);
template void attention_delta<BFloat16>(const BFloat16*, const BFloat16*, float*, int64_t, int64_t, int64_t);

// The sink's probability has no value: its score's gradient is -p delta, summed over the queries.
void sinks_backward(const float* sinks, const float* delta, const float* log_sum_exp, float* grad_sinks, int64_t heads,
                    int64_t rows) {
  parallel(heads, [&](int64_t head) {
    Vec total{}, sink = splat(sinks[head]);
    for (int64_t row = 0; row < rows; row += LANES) {
      int64_t at = head * rows + row;
      total += exponential(sink - load(log_sum_exp + at, rows - row)) * load(delta + at, rows - row);
    }
    grad_sinks[head] = -sum(total);
  });
}

}  // namespace liaoyuan

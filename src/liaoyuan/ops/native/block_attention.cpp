// Attention of a block of queries over a block of keys (attend.h, attend_backward.h), each query over its own range.
// Results are fp32, because they are summed with those of other blocks.
#include "attend.h"
#include "attend_backward.h"

namespace liaoyuan {

namespace {

template <class E, class T>
void forward(const T* query, const T* key, const T* value, const int64_t* first, const int64_t* last, float* out,
             float* log_sum_exp, const BlockShape& s) {
  int64_t groups = s.query_heads / s.key_heads, per_task = rows_per_task(s.key_heads, s.queries, groups);
  int64_t cuts = (s.queries * groups + per_task - 1) / per_task;
  parallel(cuts * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, cut = task / s.key_heads;
    Rows<T, float> rows{};
    rows.groups = groups;
    rows.query_stride = s.query_heads * s.dim;
    rows.out_stride = s.query_heads * s.value_dim;
    rows.log_sum_exp_stride = s.query_heads;
    rows.log_sum_exp_head_stride = 1;
    rows.query = query + head * groups * s.dim;
    rows.out = out + head * groups * s.value_dim;
    rows.log_sum_exp = log_sum_exp + head * groups;
    rows.first = s.queries * cut / cuts;
    rows.last = s.queries * (cut + 1) / cuts;
    rows.ranges.first = first;
    rows.ranges.last = last;
    auto row_of = [&](const T* base, int64_t dim) {
      return [=](int64_t j) { return base + (j * s.key_heads + head) * dim; };
    };
    attend<E>(rows, row_of(key, s.dim), row_of(value, s.value_dim), s.dim, s.value_dim, s.scale);
  });
}

template <class E, class T>
void backward(const float* grad, const float* delta, const float* log_sum_exp, const T* query, const T* key,
              const T* value, const int64_t* first, const int64_t* last, float* grad_query, float* grad_key,
              float* grad_value, const BlockShape& s) {
  int64_t groups = s.query_heads / s.key_heads;
  parallel(s.key_heads, [&](int64_t head) {
    int64_t first_head = head * groups;
    Backward<E, T, float, float>{
        .query = query + first_head * s.dim,
        .key = key + head * s.dim,
        .value = value + head * s.value_dim,
        .grad = grad + first_head * s.value_dim,
        .delta = delta + first_head,
        .log_sum_exp = log_sum_exp + first_head,
        .grad_query = grad_query + first_head * s.dim,
        .grad_key = grad_key + head * s.dim,
        .grad_value = grad_value + head * s.value_dim,
        .query_stride = s.query_heads * s.dim,
        .key_stride = s.key_heads * s.dim,
        .grad_stride = s.query_heads * s.value_dim,
        .value_stride = s.key_heads * s.value_dim,
        .row_stride = s.query_heads,
        .head_stride = 1,
        .groups = groups,
        .queries = s.queries,
        .keys = s.keys,
        .ranges = {.first = first, .last = last},
        .scale = s.scale,
        .packing = Packing<E>(s.dim),
        .values = Packing<E>(s.value_dim),
    }
        .run();
  });
}

}  // namespace

template <>
void block_attention<float>(const float* query, const float* key, const float* value, const int64_t* first,
                            const int64_t* last, float* out, float* log_sum_exp, BlockShape shape) {
  forward<Wide>(query, key, value, first, last, out, log_sum_exp, shape);
}

template <>
void block_attention<BFloat16>(const BFloat16* query, const BFloat16* key, const BFloat16* value, const int64_t* first,
                               const int64_t* last, float* out, float* log_sum_exp, BlockShape shape) {
  with_bf16_engine([&](auto engine) {
    forward<decltype(engine)>(query, key, value, first, last, out, log_sum_exp, shape);
  });
}

template <>
void block_attention_backward<float>(const float* grad, const float* delta, const float* log_sum_exp,
                                     const float* query, const float* key, const float* value, const int64_t* first,
                                     const int64_t* last, float* grad_query, float* grad_key, float* grad_value,
                                     BlockShape shape) {
  backward<Wide>(grad, delta, log_sum_exp, query, key, value, first, last, grad_query, grad_key, grad_value, shape);
}

template <>
void block_attention_backward<BFloat16>(const float* grad, const float* delta, const float* log_sum_exp,
                                        const BFloat16* query, const BFloat16* key, const BFloat16* value,
                                        const int64_t* first, const int64_t* last, float* grad_query, float* grad_key,
                                        float* grad_value, BlockShape shape) {
  with_bf16_engine([&](auto engine) {
    backward<decltype(engine)>(grad, delta, log_sum_exp, query, key, value, first, last, grad_query, grad_key,
                               grad_value, shape);
  });
}

}  // namespace liaoyuan

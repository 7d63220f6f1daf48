// Attention and its cache as operators of torch's dispatcher, for CPU tensors (see binding.cpp).
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "operators.h"
#include "pages.h"
#include "tensors.h"

namespace liaoyuan {

namespace {

constexpr int64_t ALL = int64_t(1) << 40;  // a window beyond every sequence

}  // namespace

int64_t window_of(std::optional<int64_t> window) {
  TORCH_CHECK(window.value_or(0) >= 0, "a window of ", *window, " tokens: it must be 1 or more, or None for all");
  return window.value_or(0) ? std::min(*window, ALL) : ALL;
}

OptionalTensor sinks_of(const OptionalTensor& sinks, int64_t heads) {
  if (!sinks || !sinks->defined()) return std::nullopt;
  TORCH_CHECK(sinks->device().is_cpu() && sinks->dim() == 1 && sinks->size(0) == heads, "sinks ", sinks->sizes(),
              " do not fit ", heads, " query heads");
  return sinks->to(at::kFloat).contiguous();
}

Tensor int_list(const Tensor& values) { return dense(values.scalar_type() == at::kInt ? values : values.to(at::kInt)); }

Tensor slot_list(const Tensor& slots_, const Tensor& cache) {
  Tensor slots = dense(slots_);
  TORCH_CHECK(slots.scalar_type() == at::kLong, "slots must be int64, not ", slots.scalar_type());
  int64_t capacity = cache.size(0) * cache.size(1);
  for (int64_t i = 0; i < slots.numel(); ++i)
    TORCH_CHECK(in<int64_t>(slots)[i] < capacity, "slot ", in<int64_t>(slots)[i], " is outside the cache");
  return slots;
}

void check_caches(const Tensor& key_cache, const Tensor& value_cache) {
  same_type(key_cache, value_cache);
  TORCH_CHECK(key_cache.dim() == 4 && value_cache.dim() == 4 && key_cache.is_contiguous() &&
                  value_cache.is_contiguous() && key_cache.sizes().slice(0, 3) == value_cache.sizes().slice(0, 3),
              "the caches of keys ", key_cache.sizes(), " and values ", value_cache.sizes(),
              " must be contiguous and fit each other");
}

void check_pages(const Tensor& tables, const Tensor& starts, const Tensor& lengths, const Tensor& cache,
                 int64_t queries) {
  TORCH_CHECK(tables.dim() == 2 && tables.size(0) == lengths.numel() && starts.numel() == lengths.numel() + 1,
              "block_tables ", tables.sizes(), ", query_starts ", starts.sizes(), " and lengths ", lengths.sizes(),
              " do not fit");
  int64_t sequences = lengths.numel(), width = tables.size(1);
  const int32_t *start = in<int32_t>(starts), *length = in<int32_t>(lengths), *table = in<int32_t>(tables);
  bool fit = start[0] == 0 && start[sequences] <= queries;
  for (int64_t s = 0; fit && s < sequences; ++s) {
    int64_t blocks = (length[s] + cache.size(1) - 1) / cache.size(1);
    fit = start[s] <= start[s + 1] && start[s + 1] - start[s] <= length[s] && blocks <= width;
    for (int64_t b = 0; fit && b < blocks; ++b)
      fit = table[s * width + b] >= 0 && table[s * width + b] < cache.size(0);
  }
  TORCH_CHECK(fit, "a sequence reaches outside its cache blocks or its queries");
}

namespace {

// Sizes [.., heads, dim]; those of a cache without its blocks.
AttentionShape attention_shape(at::IntArrayRef query, at::IntArrayRef key, at::IntArrayRef value, double scale) {
  TORCH_CHECK(query.size() == 3 && key.size() == 3 && query[2] == key[2] && key[1] > 0 && query[1] % key[1] == 0,
              "query ", query, " and key ", key, " do not fit");
  TORCH_CHECK(value.size() == 3 && value[0] == key[0] && value[1] == key[1], "key ", key, " and value ", value,
              " do not fit");
  return {query[1], key[1], query[2], value[2], ALL, float(scale)};
}
AttentionShape attention_shape(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  same_type(query, key);
  same_type(key, value);
  return attention_shape(query.sizes(), key.sizes(), value.sizes(), scale);
}

// ---- packed documents

Tensor boundary_list(const Tensor& boundaries, int64_t tokens) {
  Tensor list = boundaries.to(at::kInt).contiguous();
  TORCH_CHECK(list.dim() == 1 && list.numel() >= 1, "boundaries must be one row");
  const int32_t* entry = in<int32_t>(list);
  int64_t count = list.numel();
  bool rising = entry[0] == 0 && entry[count - 1] == tokens;
  for (int64_t i = 1; i < count; ++i) rising = rising && entry[i - 1] <= entry[i];
  TORCH_CHECK(rising, "boundaries must rise from 0 to the number of tokens");
  return list;
}

PackedShape packed_shape(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& boundaries,
                         double scale, std::optional<int64_t> window) {
  PackedShape shape{attention_shape(query, key, value, scale), query.size(0), boundaries.numel() - 1};
  TORCH_CHECK(key.size(0) == shape.tokens, "query ", query.sizes(), " and key ", key.sizes(), " do not fit");
  shape.window = window_of(window);
  return shape;
}

Two attention_cpu(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& boundaries_,
                  double scale, std::optional<int64_t> window, const OptionalTensor& sinks_) {
  PackedShape shape = packed_shape(query_, key_, value_, boundaries_, scale, window);
  OptionalTensor sinks = sinks_of(sinks_, shape.query_heads);
  Tensor query = dense(query_), key = dense(key_), value = dense(value_);
  Tensor boundaries = boundary_list(boundaries_, shape.tokens);
  Tensor result = at::empty({shape.tokens, shape.query_heads, shape.value_dim}, query.options());
  Tensor log_sum_exp = at::empty({shape.query_heads, shape.tokens}, query.options().dtype(at::kFloat));
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attention<T>(in<T>(query), in<T>(key), in<T>(value), in<int32_t>(boundaries), in<float>(sinks), out<T>(result),
                 out<float>(log_sum_exp), shape);
  });
  return {result, log_sum_exp};
}

Four attention_backward_cpu(const Tensor& grad_, const Tensor& query_, const Tensor& key_, const Tensor& value_,
                            const Tensor& boundaries_, double scale, std::optional<int64_t> window,
                            const OptionalTensor& sinks_, const Tensor& result_, const Tensor& log_sum_exp_) {
  PackedShape shape = packed_shape(query_, key_, value_, boundaries_, scale, window);
  same_shape(grad_, result_);
  same_type(grad_, query_);
  Tensor grad = dense(grad_), query = dense(query_), key = dense(key_), value = dense(value_), result = dense(result_);
  Tensor log_sum_exp = dense(log_sum_exp_), boundaries = boundary_list(boundaries_, shape.tokens);
  TORCH_CHECK(grad.numel() == shape.tokens * shape.query_heads * shape.value_dim &&
                  log_sum_exp.scalar_type() == at::kFloat && log_sum_exp.numel() == shape.query_heads * shape.tokens,
              "grad ", grad.sizes(), " or log_sum_exp ", log_sum_exp.sizes(), " does not fit");
  OptionalTensor sinks = sinks_of(sinks_, shape.query_heads);
  Tensor grad_query = at::empty_like(query), grad_key = at::empty_like(key), grad_value = at::empty_like(value);
  Tensor delta = at::empty_like(log_sum_exp), grad_sinks = at::empty({sinks ? shape.query_heads : 0}, delta.options());
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attention_delta<T>(in<T>(grad), in<T>(result), out<float>(delta), shape.tokens, shape.query_heads,
                       shape.value_dim);
    attention_backward<T>(in<T>(grad), in<float>(delta), in<float>(log_sum_exp), in<T>(query), in<T>(key), in<T>(value),
                          in<int32_t>(boundaries), out<T>(grad_query), out<T>(grad_key), out<T>(grad_value), shape);
  });
  if (sinks)
    sinks_backward(in<float>(sinks), in<float>(delta), in<float>(log_sum_exp), out<float>(grad_sinks),
                   shape.query_heads, shape.tokens);
  return {grad_query, grad_key, grad_value, sinks ? grad_sinks.to(sinks_->scalar_type()) : grad_sinks};
}

// ---- blocks

BlockShape block_shape(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first,
                       const Tensor& last, double scale) {
  BlockShape shape{attention_shape(query, key, value, scale), query.size(0), key.size(0)};
  for (const Tensor& end : {first, last})
    TORCH_CHECK(end.scalar_type() == at::kLong && end.dim() == 1 && end.size(0) == shape.queries && end.is_contiguous(),
                "first and last must be int64 [", shape.queries, "], not ", end.scalar_type(), " ", end.sizes());
  const int64_t *begin = in<int64_t>(first), *end = in<int64_t>(last);
  for (int64_t n = 0; n < shape.queries; ++n)
    TORCH_CHECK(begin[n] >= end[n] || (begin[n] >= 0 && end[n] <= shape.keys), "query ", n, " sees keys ", begin[n],
                " to ", end[n], " of ", shape.keys);
  return shape;
}

Two block_attention_cpu(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& first_,
                        const Tensor& last_, double scale) {
  Tensor query = dense(query_), key = dense(key_), value = dense(value_), first = dense(first_), last = dense(last_);
  BlockShape shape = block_shape(query, key, value, first, last, scale);
  auto real = query.options().dtype(at::kFloat);
  Tensor result = at::empty({shape.queries, shape.query_heads, shape.value_dim}, real);
  Tensor log_sum_exp = at::empty({shape.queries, shape.query_heads}, real);
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    block_attention<T>(in<T>(query), in<T>(key), in<T>(value), in<int64_t>(first), in<int64_t>(last),
                       out<float>(result), out<float>(log_sum_exp), shape);
  });
  return {result, log_sum_exp};
}

Three block_attention_backward_cpu(const Tensor& grad_, const Tensor& delta_, const Tensor& log_sum_exp_,
                                   const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                   const Tensor& first_, const Tensor& last_, double scale) {
  Tensor query = dense(query_), key = dense(key_), value = dense(value_), first = dense(first_), last = dense(last_);
  Tensor grad = dense(grad_), delta = dense(delta_), log_sum_exp = dense(log_sum_exp_);
  BlockShape shape = block_shape(query, key, value, first, last, scale);
  int64_t rows = shape.queries * shape.query_heads;
  for (const Tensor& x : {grad, delta, log_sum_exp})
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.numel() == (x.dim() == 3 ? rows * shape.value_dim : rows),
                "grad, delta and log_sum_exp must be float32 [queries, heads, ...], not ", x.scalar_type(), " ",
                x.sizes());
  TORCH_CHECK(grad.dim() == 3, "grad must have three dimensions, not ", grad.dim());
  Tensor grad_query = at::empty_like(query, grad.options()), grad_key = at::empty_like(key, grad.options());
  Tensor grad_value = at::empty_like(value, grad.options());
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    block_attention_backward<T>(in<float>(grad), in<float>(delta), in<float>(log_sum_exp), in<T>(query), in<T>(key),
                                in<T>(value), in<int64_t>(first), in<int64_t>(last), out<float>(grad_query),
                                out<float>(grad_key), out<float>(grad_value), shape);
  });
  return {grad_query, grad_key, grad_value};
}

// ---- paged cache

Tensor paged_attention_cpu(const Tensor& query_, const Tensor& key_cache, const Tensor& value_cache,
                           const Tensor& block_tables_, const Tensor& query_starts_, const Tensor& lengths_,
                           double scale, std::optional<int64_t> window, const OptionalTensor& sinks_) {
  check_caches(key_cache, value_cache);
  same_type(query_, key_cache);
  PagedShape shape{
      attention_shape(query_.sizes(), key_cache.sizes().slice(1), value_cache.sizes().slice(1), scale)};
  shape.window = window_of(window);
  OptionalTensor sinks = sinks_of(sinks_, shape.query_heads);
  Tensor query = dense(query_), tables = int_list(block_tables_);
  Tensor starts = int_list(query_starts_), lengths = int_list(lengths_);
  check_pages(tables, starts, lengths, key_cache, query.size(0));
  shape.sequences = lengths.numel(), shape.block_size = key_cache.size(1), shape.max_blocks = tables.size(1);
  Tensor result = at::empty({query.size(0), shape.query_heads, shape.value_dim}, query.options());
  int64_t used = in<int32_t>(starts)[shape.sequences];
  result.narrow(0, used, query.size(0) - used).zero_();
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    paged_attention<T>(in<T>(query), in<T>(key_cache), in<T>(value_cache), in<int32_t>(tables), in<int32_t>(starts),
                       in<int32_t>(lengths), in<float>(sinks), out<T>(result), shape);
  });
  return result;
}

void write_cache_cpu(const Tensor& key_, const Tensor& value_, Tensor& key_cache, Tensor& value_cache,
                     const Tensor& slots_) {
  Tensor key = dense(key_), value = dense(value_);
  check_caches(key_cache, value_cache);
  Tensor slots = slot_list(slots_, key_cache);
  for (auto [rows, cache] : {std::pair(key, key_cache), std::pair(value, value_cache)}) {
    same_type(rows, cache);
    TORCH_CHECK(rows.dim() == 3 && slots.numel() == rows.size(0) && rows.sizes().slice(1) == cache.sizes().slice(2),
                slots.numel(), " slots, rows ", rows.sizes(), " and cache ", cache.sizes(), " do not fit");
    write_cache(in<char>(rows), out<char>(cache), in<int64_t>(slots), rows.size(0),
                rows.size(1) * rows.size(2) * rows.element_size());
  }
}

}  // namespace

bool register_attention(torch::Library& library, const std::string& name) {
  if (name == "attention") {
    library.impl("attention", &attention_cpu);
    library.impl("attention_backward", &attention_backward_cpu);
  } else if (name == "block_attention") {
    library.impl("block_attention", &block_attention_cpu);
    library.impl("block_attention_backward", &block_attention_backward_cpu);
  } else if (name == "paged_attention") {
    library.impl("paged_attention", &paged_attention_cpu);
  } else if (name == "write_cache") {
    library.impl("write_cache", &write_cache_cpu);
  } else {
    return false;
  }
  return true;
}

}  // namespace liaoyuan

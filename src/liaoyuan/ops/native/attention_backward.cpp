// Attention backward over packed documents (attend_backward.h). A task is a document and a key head; the rows of a long
// document are cut into parts, whose sums for keys and values are added in the order of the parts. The cuts follow from
// the document alone, and so do the bits.
#include <memory>
#include <vector>

#include "attend_backward.h"

namespace liaoyuan {

namespace {

// Parts: at most so many of a key head, and of all of a document's, as each has sums of its own in memory.
constexpr int64_t ROWS_PER_PART = 2048, PARTS = 4, ALL_PARTS = 16;

struct Document {
  int64_t start, length, parts, sums;  // the last: rows of parts' sums for a key head before this document's
};

struct Documents {
  std::vector<Document> all;
  int64_t most = 1, sums = 0;  // parts of a document; rows of parts' sums for a key head

  Documents(const int32_t* boundaries, int64_t count, int64_t groups, int64_t key_heads) {
    int64_t limit = std::clamp<int64_t>(ALL_PARTS / key_heads, 1, PARTS);
    for (int64_t m = 0; m < count; ++m) {
      int64_t length = boundaries[m + 1] - boundaries[m];
      if (length == 0) continue;
      int64_t parts = std::clamp<int64_t>(length * groups / ROWS_PER_PART, 1, limit);
      all.push_back({boundaries[m], length, parts, sums});
      if (parts > 1) sums += parts * length;
      most = std::max(most, parts);
    }
  }
};

// Blocks of rows of about the same work: a row sees as many keys as there are rows before it.
Range cut(int64_t blocks, int64_t part, int64_t parts) {
  auto edge = [&](int64_t i) { return int64_t(std::llround(double(blocks) * std::sqrt(double(i) / double(parts)))); };
  return {edge(part), edge(part + 1)};
}

template <class E, class T>
Backward<E, T, T, T> one_head(const T* grad, const float* delta, const float* log_sum_exp, const T* query, const T* key,
                              const T* value, T* grad_query, T* grad_key, T* grad_value, const PackedShape& s,
                              const Document& document, int64_t head) {
  int64_t groups = s.query_heads / s.key_heads, first_head = document.start * s.query_heads + head * groups;
  int64_t query_at = first_head * s.dim, key_at = (document.start * s.key_heads + head) * s.dim;
  int64_t value_at = (document.start * s.key_heads + head) * s.value_dim;
  int64_t row_at = head * groups * s.tokens + document.start;
  return {
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
      .queries = document.length,
      .keys = document.length,
      .ranges = {.window = s.window},
      .scale = s.scale,
      .packing = Packing<E>(s.dim),
      .values = Packing<E>(s.value_dim),
  };
}

// to [rows, stride], of which `dim`: the sum of parts [count, rows, dim].
template <class T>
void add_parts(const float* parts, int64_t count, int64_t rows, int64_t dim, T* to, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < dim; d += LANES) {
      const float* from = parts + row * dim + d;
      Vec total = load(from, dim - d);
      for (int64_t part = 1; part < count; ++part) total += load(from + part * rows * dim, dim - d);
      store(to + row * stride + d, total, dim - d);
    }
}

template <class E, class T>
void backward(const T* grad, const float* delta, const float* log_sum_exp, const T* query, const T* key, const T* value,
              const int32_t* boundaries, T* grad_query, T* grad_key, T* grad_value, const PackedShape& s) {
  const Documents documents(boundaries, s.documents, s.query_heads / s.key_heads, s.key_heads);
  const int64_t count = int64_t(documents.all.size()), most = documents.most;
  std::unique_ptr<float[]> sums(new float[size_t(documents.sums * s.key_heads * (s.dim + s.value_dim))]);
  float *key_sums = sums.get(), *value_sums = key_sums + documents.sums * s.key_heads * s.dim;
  auto place = [&](const Document& one, int64_t head) { return documents.sums * head + one.sums; };
  parallel(count * most * s.key_heads, [&](int64_t task) {
    const Document& one = documents.all[size_t(task / s.key_heads / most)];
    int64_t head = task % s.key_heads, part = task / s.key_heads % most;
    if (part >= one.parts) return;
    auto work = one_head<E>(grad, delta, log_sum_exp, query, key, value, grad_query, grad_key, grad_value, s, one, head);
    if (one.parts == 1) return work.run();
    int64_t row = place(one, head) + part * one.length;
    work.run(cut(work.row_blocks(), part, one.parts), key_sums + row * s.dim, value_sums + row * s.value_dim, s.dim,
             s.value_dim);
  });
  if (documents.sums == 0) return;
  parallel(count * s.key_heads, [&](int64_t task) {
    const Document& one = documents.all[size_t(task / s.key_heads)];
    int64_t head = task % s.key_heads, row = one.start * s.key_heads + head, from = place(one, head);
    if (one.parts == 1) return;
    add_parts(key_sums + from * s.dim, one.parts, one.length, s.dim, grad_key + row * s.dim, s.key_heads * s.dim);
    add_parts(value_sums + from * s.value_dim, one.parts, one.length, s.value_dim, grad_value + row * s.value_dim,
              s.key_heads * s.value_dim);
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

// One layer of a dense decoder over a paged cache: the kernels of its parts, one after the other, in memory that stays.
// The bits are those of the parts called apart, since it is the same code.
#include "decoder_layer.h"

#include <algorithm>
#include <cstring>

namespace liaoyuan {

namespace {

constexpr int SLOT = 4;            // of `scratch`, which no other kernel uses
constexpr int64_t ALIGNMENT = 64;  // bytes

// Of attention and of the feed-forward part in turn; `normed` and `added` outlive the one that made them.
template <class T>
struct Buffers {
  T *normed, *added, *qkv, *query, *key, *value, *attended, *gate_up, *hidden;

  explicit Buffers(const LayerShape& s) {
    auto room = [](int64_t count) { return (count * int64_t(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; };
    int64_t stream = room(s.rows * s.hidden), merged = room(s.rows * s.merged()), keys = room(s.rows * s.keys());
    int64_t queries = room(s.rows * s.queries()), pairs = room(s.rows * 2 * s.intermediate);
    int64_t products = room(s.rows * s.intermediate);
    int64_t most = std::max(merged + 2 * queries + 2 * keys, pairs + products);
    char* at = static_cast<char*>(scratch(SLOT, size_t(2 * stream + most)));
    auto next = [&](T*& buffer, int64_t bytes) { buffer = reinterpret_cast<T*>(at), at += bytes; };
    next(normed, stream), next(added, stream);
    char* shared = at;
    next(qkv, merged), next(query, queries), next(key, keys), next(value, keys), next(attended, queries);
    at = shared;
    next(gate_up, pairs), next(hidden, products);
  }
};

template <class T>
void project(const T* x, const Projection<T>& to, T* result, int64_t rows, int64_t depth, int64_t columns) {
  if (!to.weight)
    return quantised_linear<T>(to.few, x, to.bias, result, {rows, columns, depth, to.group, to.groups});
  MatrixShape shape{rows, columns, depth, false, true, depth, depth, columns};
  multiply<T>({x, to.weight, result, shape, to.bias, nullptr});
}

template <class T>
void attend(const LayerWeights<T>& w, const LayerPages<T>& pages, const float* cosine, const float* sine,
            const Buffers<T>& b, const LayerShape& s) {
  project(b.normed, w.qkv, b.qkv, s.rows, s.hidden, s.merged());
  RotaryShape rotary{s.rows, s.attention.key_heads, s.attention.query_heads / s.attention.key_heads, s.attention.dim,
                     s.eps};
  split_rotary(b.qkv, cosine, sine, w.query_norm, w.key_norm, b.query, b.key, b.value, rotary);
  for (auto [from, cache] : {std::pair(b.key, pages.keys), std::pair(b.value, pages.values)})
    write_cache(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(cache), pages.slots, s.rows,
                s.keys() * int64_t(sizeof(T)));
  int64_t used = pages.starts[s.attention.sequences];
  std::memset(b.attended + used * s.queries(), 0, size_t((s.rows - used) * s.queries()) * sizeof(T));
  paged_attention<T>(b.query, pages.keys, pages.values, pages.tables, pages.starts, pages.lengths, w.sinks, b.attended,
                     s.attention);
  project(b.attended, w.output, b.added, s.rows, s.queries(), s.hidden);
}

}  // namespace

template <class T>
void decoder_layer(const T* residual, const T* x, const float* cosine, const float* sine, const LayerPages<T>& pages,
                   const LayerWeights<T>& w, T* total, T* out, const LayerShape& s) {
  Buffers<T> b(s);
  rms_norm<T>(x ? residual : nullptr, x ? x : residual, w.input_norm, x ? total : nullptr, b.normed, s.rows, s.hidden,
              s.eps);
  attend(w, pages, cosine, sine, b, s);
  rms_norm<T>(x ? total : residual, b.added, w.post_norm, total, b.normed, s.rows, s.hidden, s.eps);
  project(b.normed, w.gate_up, b.gate_up, s.rows, s.hidden, 2 * s.intermediate);
  gated<T>(b.gate_up, b.hidden, s.rows * s.intermediate, {GateKind::silu, 0.0f, 0.0f});
  project(b.hidden, w.down, out, s.rows, s.intermediate, s.hidden);
}

#define INSTANTIATE(T)                                                                                             \
  template void decoder_layer<T>(const T*, const T*, const float*, const float*, const LayerPages<T>&,             \
                                 const LayerWeights<T>&, T*, T*, const LayerShape&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan

// The kernels' interface: plain pointers, so that only the binding needs torch's headers.
// T is float or BFloat16; all rows are contiguous unless a stride is named; strides count elements.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace liaoyuan {

// Run body(0), ..., body(tasks - 1) on torch's threads. Each task writes its own memory, so that the
// result does not depend on who runs it. Defined in binding.cpp.
void run_tasks(int64_t tasks, const void* body, void (*task)(const void*, int64_t));

template <class Body>
void parallel(int64_t tasks, const Body& body) {
  run_tasks(tasks, &body, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); });
}

// The same, where neighbouring tasks read neighbouring memory: each thread walks a range of its own from end to end, as
// memory likes it, and then helps with what others have left.
void run_ranges(int64_t tasks, const void* body, void (*task)(const void*, int64_t));

template <class Body>
void parallel_ranges(int64_t tasks, const Body& body) {
  run_ranges(tasks, &body, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); });
}

int64_t threads();  // how many run tasks

// A buffer of this thread that only grows; valid until the thread's next call with the same slot.
void* scratch(int slot, size_t bytes);

// norm.cpp. With residual: total = residual + x, and total is normed; without: x is normed.
template <class T>
void rms_norm(const T* residual, const T* x, const T* weight, T* total, T* out, int64_t rows, int64_t width, float eps);
// grad_total may be null (no gradient came along the residual stream).
template <class T>
void rms_norm_backward(const T* grad_total, const T* grad, const T* total, const T* weight, T* grad_in, T* grad_weight,
                       int64_t rows, int64_t width, float eps);

// rotary.cpp. qkv: [rows, key_heads, groups + 2, dim]; a null norm weight leaves that norm out.
struct RotaryShape {
  int64_t rows, key_heads, groups, dim;
  float eps;
};
template <class T>
void split_rotary(const T* qkv, const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* query,
                  T* key, T* value, RotaryShape shape);
template <class T>
void split_rotary_backward(const T* grad_query, const T* grad_key, const T* grad_value, const T* qkv,
                           const float* cosine, const float* sine, const T* query_norm, const T* key_norm, T* grad_qkv,
                           T* grad_query_norm, T* grad_key_norm, RotaryShape shape);

// latent_rotary.cpp: the last `turned` dimensions of a head are rotated; those of the key are shared by all heads.
// query: [rows, heads, own + turned]; expanded: [rows, heads, own + value_dim]; shared: [rows, turned].
struct LatentShape {
  int64_t rows, heads, own, turned, value_dim;
};
template <class T>
void latent_rotary(const T* query, const T* expanded, const T* shared, const float* cosine, const float* sine,
                   T* turned_query, T* key, T* value, const LatentShape& shape);
template <class T>
void latent_rotary_backward(const T* grad_query, const T* grad_key, const T* grad_value, const float* cosine,
                            const float* sine, T* grad_unturned, T* grad_expanded, T* grad_shared,
                            const LatentShape& shape);

// gated.cpp: activation(gate) * up of pairs (gate, up) in memory; count: of the results. The clamped one alone has a
// limit and alpha.
struct GateKind {
  enum { silu, gelu, gelu_tanh, clamped_silu } activation;
  float limit, alpha;
};
template <class T>
void gated(const T* gate_up, T* out, int64_t count, const GateKind& kind);
template <class T>
void gated_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t count, const GateKind& kind);

// denominator.h: of a row of scores so far, the highest one and the sum of exp(score - top).
struct Denominator {
  float top = std::numeric_limits<float>::lowest();  // finite, so that scores of -inf have a difference to it
  double sum = 0;

  // Scale to a top that is at least as high; returns the factor.
  double rise(float highest) {
    if (!(highest > top)) return 1;
    double factor = std::exp(double(top) - double(highest));
    top = highest;
    sum *= factor;
    return factor;
  }
  float log() const { return float(double(top) + std::log(sum)); }
};

// What training and sampling take for a token's log-probability. Rounding must not raise it above that of certainty.
inline float log_probability(float score, float log_sum_exp) { return std::min(score - log_sum_exp, 0.0f); }

// softmax.cpp: a chunk of the logits, columns first, ..., first + columns - 1 of some rows.
template <class T>
struct LogitChunk {
  T* logits;
  int64_t stride, rows, columns, first;
};
struct LogitState {  // of a row's logits so far; the two last if moments are wanted
  Denominator denominator;
  float chosen = 0;    // the target's
  double product = 0;  // sum of exp(logit - top) * (logit - top)
  float logits = 0;    // their sum
};
// Take a chunk into the state; its columns are a multiple of a block, but in the last one. Targets that are not in the
// chunk do not count.
template <class T>
void read_logits(const LogitChunk<const T>& chunk, const int64_t* targets, LogitState* state, bool moments);
template <class T>
void log_sum_exp(const T* logits, float* out, int64_t rows, int64_t columns);
// The gradient of a row's logits z: softmax * (of_sum + (z - log_sum_exp) * slope) + every, and chosen at the target.
struct LogitGradient {
  float log_sum_exp, chosen, of_sum, slope, every;
};
// out [rows, columns] may be the logits themselves; without moments slope and every are zero.
template <class T>
void logit_gradients(const LogitChunk<const T>& chunk, T* out, const int64_t* targets, const LogitGradient* grads,
                     bool moments);
// total += part, in fp32: begin: total holds nothing yet; end: the sum goes to `out` instead.
template <class T>
void add_part(const T* part, float* total, T* out, int64_t count, bool begin, bool end);

// attention.cpp. A token sees `window` tokens, itself included; sinks [query_heads] may be null.
struct AttentionShape {
  int64_t query_heads, key_heads, dim, value_dim, window;
  float scale;
};
struct PackedShape : AttentionShape {
  int64_t tokens, documents;
};
template <class T>
void attention(const T* query, const T* key, const T* value, const int32_t* boundaries, const float* sinks, T* out,
               float* log_sum_exp, PackedShape shape);
struct PagedShape : AttentionShape {
  int64_t sequences, block_size, max_blocks;
};
template <class T>
void paged_attention(const T* query, const T* key_cache, const T* value_cache, const int32_t* block_tables,
                     const int32_t* query_starts, const int32_t* lengths, const float* sinks, T* out, PagedShape shape);

// attention_backward.cpp. delta, log_sum_exp: [query_heads, tokens].
template <class T>
void attention_backward(const T* grad, const float* delta, const float* log_sum_exp, const T* query, const T* key,
                        const T* value, const int32_t* boundaries, T* grad_query, T* grad_key, T* grad_value,
                        PackedShape shape);
// delta [heads, rows] = rowsum(grad * out) of [rows, heads, dim]
template <class T>
void attention_delta(const T* grad, const T* out, float* delta, int64_t rows, int64_t heads, int64_t dim);
void sinks_backward(const float* sinks, const float* delta, const float* log_sum_exp, float* grad_sinks, int64_t heads,
                    int64_t rows);

// block_attention.cpp: query n sees keys first[n] ... last[n] - 1. delta, log_sum_exp: [queries, query_heads].
struct BlockShape : AttentionShape {
  int64_t queries, keys;
};
template <class T>
void block_attention(const T* query, const T* key, const T* value, const int64_t* first, const int64_t* last,
                     float* out, float* log_sum_exp, BlockShape shape);
template <class T>
void block_attention_backward(const float* grad, const float* delta, const float* log_sum_exp, const T* query,
                              const T* key, const T* value, const int64_t* first, const int64_t* last,
                              float* grad_query, float* grad_key, float* grad_value, BlockShape shape);

// matrix.cpp: c [rows, columns] = op(a) op(b) (+ bias [columns] + residual [rows, columns]), summed in fp32 and rounded
// once. Each element is summed along `depth` in the same order whatever the other sizes are.
struct MatrixShape {
  int64_t rows, columns, depth;
  bool a_transposed;  // a is stored [depth, rows], else [rows, depth]
  bool b_transposed;  // b is stored [columns, depth], else [depth, columns]
  int64_t a_stride, b_stride, c_stride;  // the residual's is that of c
};
template <class T>
struct Product {
  const T *a, *b;
  T* c;
  MatrixShape shape;
  const T *bias = nullptr, *residual = nullptr;
};
// All at once: their tasks are shared out together.
template <class T>
void multiply(const Product<T>* products, int64_t count);
template <class T>
void multiply(const Product<T>& product) { multiply(&product, 1); }

// routing.cpp: rows starts[e] ... starts[e + 1] - 1 belong to expert e; sums [experts, columns].
struct Groups {
  const int64_t* starts;
  int64_t experts;
};
template <class T>
void grouped_sum(const T* rows, T* sums, const Groups& groups, int64_t columns);

// routing.cpp. groups divides experts; the best kept_groups of them count, by the sum of their group_best best scores.
struct RouteShape {
  int64_t rows, experts, kept, groups, kept_groups, group_best;
  bool sigmoid, normalise;
  float scale;
};
void route(const float* logits, const float* bias, float* weights, int64_t* chosen, const RouteShape& shape);
void route_backward(const float* grad, const float* logits, const int64_t* chosen, float* grad_logits,
                    const RouteShape& shape);
// order [count]: places in `chosen`, by expert; false: there is an expert that does not exist.
bool sort_by_expert(const int64_t* chosen, int64_t count, int64_t experts, int64_t* order, int64_t* sizes);
// The inverse of an order; false: it is no permutation.
bool places_of(const int64_t* order, int64_t count, int64_t* places);
void gather_rows(const char* x, const int64_t* order, char* rows, int64_t count, int64_t per_token, int64_t row_bytes);
// Null weights: each is 1.
template <class T>
void combine_rows(const T* rows, const int64_t* places, const float* weights, T* out, int64_t tokens, int64_t per_token,
                  int64_t width);
template <class T>
void combine_rows_backward(const T* grad, const T* rows, const int64_t* places, const float* weights, T* grad_rows,
                           float* grad_weights, int64_t tokens, int64_t per_token, int64_t width);

// quantised.cpp: result [rows, columns] = x [rows, depth] times the widened weights (+ bias). A group of 0: one scale for
// a whole output. int4 holds blocks of 128 weights in 64 bytes: halfword i has the weights i, 32 + i, 64 + i, 96 + i.
enum class QuantisedBits { int8, fp8, int4, int4_zeros };
struct QuantisedWeights {
  QuantisedBits bits;
  const uint8_t* data;
  const BFloat16* scales;  // [columns, groups], as the zeros, which may be null
  const uint8_t* zeros;
};
struct QuantisedShape {
  int64_t rows, columns, depth, group, groups;
};
template <class T>
void quantised_linear(const QuantisedWeights& weights, const T* x, const T* bias, T* result,
                      const QuantisedShape& shape);

// sampling.cpp. One row of settings as the operator has them.
struct SamplingRow {
  double temperature, top_k, top_p, min_p, repetition, presence, frequency, uniform;
};
struct SamplingInputs {
  const SamplingRow* rows;
  const int64_t *history, *prompts;  // [rows, history_length], [rows]; null: no penalties
  int64_t history_length;
  const uint32_t* mask;  // [rows, mask_words], bits of the tokens that are allowed; null: all are
  int64_t mask_words;
};
// A row without a token that can be drawn gets -1, and log-probabilities that are not numbers.
template <class T>
void sample_tokens(const T* logits, const SamplingInputs& inputs, int64_t* tokens, float* log_probs, float* filtered,
                   int64_t rows, int64_t vocabulary);

// optimiser.cpp. weight = keep * weight - rate * first / (second_scale * sqrt(second) + eps), after the moments' steps.
struct AdamWStep {
  float keep, rate, first_rate, second_keep, second_rate, second_scale, eps;
  uint32_t key;    // of the random numbers that round a bf16 weight
  int64_t offset;  // number of the first element among them
};
template <class T, class G>
void adamw_step(T* weight, const G* gradient, float* first, float* second, int64_t count, const AdamWStep& step);
template <class T>
double square_sum(const T* x, int64_t count);
uint64_t checksum(const char* bytes, int64_t count);

// softmax.cpp too
void write_cache(const char* from, char* cache, const int64_t* slots, int64_t rows, int64_t row_bytes);

}  // namespace liaoyuan

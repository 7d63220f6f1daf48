// The decoder layer that runs as one, as operators of torch's dispatcher, for CPU tensors (see binding.cpp): one for
// whole weights, and one for those of few bits, so that the first need not carry what the second has more.
#include <ATen/ops/empty_like.h>

#include "decoder_layer.h"
#include "few_bits.h"
#include "pages.h"
#include "tensors.h"

namespace liaoyuan {

namespace {

// What projections of few bits have beside their data, in the order of the layer's four; no kind: they are whole.
struct FewBits {
  at::TensorList scales = {}, zeros = {};
  std::string kind = {};
  int64_t group = 0;

  bool any() const { return !kind.empty(); }
  void check() const {
    TORCH_CHECK(!any() || (scales.size() == 4 && (zeros.empty() || zeros.size() == 4)),
                "four projections have scales, and zeros all or none, not ", scales.size(), " and ", zeros.size());
  }
};

// Projection `place` of the layer, of `depth` to `columns`; weights lie as they are, since a copy of each in every step
// would be slow.
template <class T>
Projection<T> projection(const FewBits& few, size_t place, const Tensor& weight, const OptionalTensor& bias,
                         int64_t depth, int64_t columns) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == columns && (few.any() || weight.size(1) == depth) &&
                  weight.is_contiguous() &&
                  (!bias || (bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous())),
              "a projection of ", depth, " to ", columns, " must be contiguous, with a bias that fits, not ",
              weight.sizes());
  if (!few.any()) return {in<T>(weight), in<T>(bias)};
  const Tensor& scales = few.scales[place];
  OptionalTensor zeros = few.zeros.empty() ? std::nullopt : OptionalTensor(few.zeros[place]);
  return {nullptr, in<T>(bias), quantised_weights(weight, scales, zeros, few.kind, few.group, depth), few.group,
          scales.size(1)};
}

void check_norm(const Tensor& weight, int64_t size) {
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == size && weight.is_contiguous(), "a norm of ", weight.sizes(),
              " does not fit rows of ", size);
}

void check_rows(const Tensor& residual, const OptionalTensor& x, const Tensor& cosine, const Tensor& sine,
                const Tensor& slots, int64_t dim) {
  TORCH_CHECK(residual.dim() == 2, "the stream must have two dimensions, not ", residual.dim());
  if (x) same_shape(residual, *x);
  TORCH_CHECK(dim > 0 && dim <= 512 && dim % 2 == 0, "a head of ", dim, " rotated dimensions is not supported");
  for (const Tensor* angle : {&cosine, &sine})
    TORCH_CHECK(angle->scalar_type() == at::kFloat && angle->dim() == 2 && angle->size(0) == residual.size(0) &&
                    angle->size(1) == dim / 2,
                "the angles must be float32 [", residual.size(0), ", ", dim / 2, "], not ", angle->scalar_type(), " ",
                angle->sizes());
  TORCH_CHECK(slots.dim() == 1 && slots.size(0) == residual.size(0), slots.sizes(), " slots do not fit the rows");
}

// Bits: the types of FewBits, or none.
template <class... Bits>
struct Layer {
  static Two run(const Tensor& residual_, const OptionalTensor& x_, const Tensor& cosine_, const Tensor& sine_,
                 Tensor& key_cache, Tensor& value_cache, const Tensor& slots_, const Tensor& block_tables_,
                 const Tensor& query_starts_, const Tensor& lengths_, const Tensor& input_norm, const Tensor& qkv,
                 const OptionalTensor& qkv_bias, const OptionalTensor& query_norm, const OptionalTensor& key_norm,
                 const OptionalTensor& sinks_, const Tensor& output, const OptionalTensor& output_bias,
                 const Tensor& post_norm, const Tensor& gate_up, const OptionalTensor& gate_up_bias, const Tensor& down,
                 const OptionalTensor& down_bias, Bits... bits, double scale, std::optional<int64_t> window,
                 double eps) {
    FewBits few{std::move(bits)...};
    few.check();
    same_types(residual_, key_cache, value_cache, input_norm, post_norm);
    if (!few.any()) same_types(residual_, qkv, output, gate_up, down);
    same_types(residual_, qkv_bias, query_norm, key_norm, output_bias, gate_up_bias, down_bias);
    check_caches(key_cache, value_cache);
    int64_t heads = key_cache.size(2), dim = key_cache.size(3), keys = heads * dim;
    check_rows(residual_, x_, cosine_, sine_, slots_, dim);
    TORCH_CHECK(qkv.dim() == 2 && gate_up.dim() == 2, "the projections must be matrices");
    int64_t queries = qkv.size(0) - 2 * keys;
    TORCH_CHECK(value_cache.size(3) == dim && heads > 0 && queries > 0 && queries % keys == 0, "the caches ",
                key_cache.sizes(), " and ", value_cache.sizes(), " do not fit the first projection, ", qkv.sizes());
    TORCH_CHECK(query_norm.has_value() == key_norm.has_value(), "both heads are normalised, or none");
    Tensor residual = dense(residual_), cosine = dense(cosine_), sine = dense(sine_);
    OptionalTensor x = dense(x_), sinks = sinks_of(sinks_, queries / dim);
    Tensor tables = int_list(block_tables_), starts = int_list(query_starts_), lengths = int_list(lengths_);
    check_pages(tables, starts, lengths, key_cache, residual.size(0));
    Tensor slots = slot_list(slots_, key_cache);

    PagedShape paged{AttentionShape{queries / dim, heads, dim, dim, window_of(window), float(scale)}, lengths.numel(),
                     key_cache.size(1), tables.size(1)};
    LayerShape shape{residual.size(0), residual.size(1), gate_up.size(0) / 2, float(eps), paged};
    check_norm(input_norm, shape.hidden);
    check_norm(post_norm, shape.hidden);
    if (query_norm) check_norm(*query_norm, dim), check_norm(*key_norm, dim);
    Tensor total = at::empty_like(residual), result = at::empty_like(residual);
    by_type(residual, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      LayerPages<T> pages{out<T>(key_cache),   out<T>(value_cache),  in<int64_t>(slots),
                          in<int32_t>(tables), in<int32_t>(starts), in<int32_t>(lengths)};
      LayerWeights<T> weights{in<T>(input_norm),
                              in<T>(query_norm),
                              in<T>(key_norm),
                              in<T>(post_norm),
                              projection<T>(few, 0, qkv, qkv_bias, shape.hidden, shape.merged()),
                              projection<T>(few, 1, output, output_bias, shape.queries(), shape.hidden),
                              projection<T>(few, 2, gate_up, gate_up_bias, shape.hidden, 2 * shape.intermediate),
                              projection<T>(few, 3, down, down_bias, shape.intermediate, shape.hidden),
                              in<float>(sinks)};
      decoder_layer<T>(in<T>(residual), in<T>(x), in<float>(cosine), in<float>(sine), pages, weights, out<T>(total),
                       out<T>(result), shape);
    });
    return {total, result};
  }
};

}  // namespace

bool register_layer(torch::Library& library, const std::string& name) {
  if (name == "decoder_layer")
    library.impl("decoder_layer", &Layer<>::run);
  else if (name == "quantised_decoder_layer")
    library.impl("quantised_decoder_layer", &Layer<at::TensorList, at::TensorList, std::string, int64_t>::run);
  else
    return false;
  return true;
}

}  // namespace liaoyuan

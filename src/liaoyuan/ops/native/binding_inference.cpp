// The kernels that serve inference alone, as operators of torch's dispatcher; see binding.cpp.
#include <ATen/ops/empty.h>

#include "few_bits.h"
#include "tensors.h"

namespace liaoyuan {

namespace {

QuantisedBits bits_of(const std::string& kind, bool with_zeros) {
  if (kind == "int8" && !with_zeros) return QuantisedBits::int8;
  if (kind == "fp8" && !with_zeros) return QuantisedBits::fp8;
  TORCH_CHECK(kind == "int4", "no quantised weights of kind ", kind, with_zeros ? " with zeros" : "");
  return with_zeros ? QuantisedBits::int4_zeros : QuantisedBits::int4;
}

Tensor quantised_linear_cpu(const Tensor& x_, const Tensor& data_, const Tensor& scales_, const OptionalTensor& zeros_,
                            const OptionalTensor& bias_, std::string kind, int64_t group) {
  TORCH_CHECK(x_.dim() == 2, "x must be a matrix");
  if (bias_) same_type(x_, *bias_);
  Tensor x = dense(x_), data = dense(data_), scales = dense(scales_);
  OptionalTensor zeros = dense(zeros_), bias = dense(bias_);
  QuantisedWeights weights = quantised_weights(data, scales, zeros, kind, group, x.size(1));
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == data.size(0)), "the bias does not fit the outputs");
  Tensor result = at::empty({x.size(0), data.size(0)}, x.options());
  // What lies beyond the depth is read as zero; the groups there have a scale, and x is zero.
  QuantisedShape shape{x.size(0), data.size(0), x.size(1), group, scales.size(1)};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantised_linear<T>(weights, in<T>(x), in<T>(bias), out<T>(result), shape);
  });
  return result;
}

// ---- sampling

Three sample_tokens_cpu(const Tensor& logits_, const Tensor& settings_, const OptionalTensor& history_,
                        const OptionalTensor& prompts_, const OptionalTensor& mask_) {
  Tensor logits = dense(logits_), settings = dense(settings_.to(at::kDouble));
  OptionalTensor history = dense(history_), prompts = dense(prompts_), mask = dense(mask_);
  TORCH_CHECK(logits.dim() == 2 && settings.dim() == 2 && settings.size(0) == logits.size(0) && settings.size(1) == 8,
              "settings ", settings.sizes(), " do not fit logits ", logits.sizes());
  int64_t rows = logits.size(0), vocabulary = logits.size(1), words = (vocabulary + 31) / 32;
  TORCH_CHECK(vocabulary > 0 && vocabulary < (int64_t(1) << 31), "no vocabulary of ", vocabulary, " tokens");
  TORCH_CHECK(bool(history) == bool(prompts), "a history needs the lengths of its prompts");
  TORCH_CHECK(!history || (history->dim() == 2 && history->size(0) == rows && prompts->numel() == rows &&
                           history->scalar_type() == at::kLong && prompts->scalar_type() == at::kLong),
              "the history does not fit ", rows, " rows");
  TORCH_CHECK(!mask || (mask->dim() == 2 && mask->size(0) == rows && mask->size(1) == words &&
                        mask->scalar_type() == at::kInt),
              "the mask does not fit logits ", logits.sizes());
  SamplingInputs inputs{static_cast<const SamplingRow*>(settings.const_data_ptr()), in<int64_t>(history),
                        in<int64_t>(prompts), history ? history->size(1) : 0, in<uint32_t>(mask), words};
  auto real = logits.options().dtype(at::kFloat);
  Tensor tokens = at::empty({rows}, logits.options().dtype(at::kLong));
  Tensor log_probs = at::empty({rows}, real), filtered = at::empty({rows}, real);
  by_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sample_tokens<T>(in<T>(logits), inputs, out<int64_t>(tokens), out<float>(log_probs), out<float>(filtered), rows,
                     vocabulary);
  });
  return {tokens, log_probs, filtered};
}

Tensor log_sum_exp_cpu(const Tensor& logits_) {
  Tensor logits = dense(logits_);
  TORCH_CHECK(logits.dim() == 2, "logits must be a matrix, not ", logits.sizes());
  Tensor found = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  by_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    log_sum_exp<T>(in<T>(logits), out<float>(found), logits.size(0), logits.size(1));
  });
  return found;
}

}  // namespace

QuantisedWeights quantised_weights(const Tensor& data, const Tensor& scales, const OptionalTensor& zeros,
                                   const std::string& kind, int64_t group, int64_t depth) {
  TORCH_CHECK(data.dim() == 2 && scales.dim() == 2, "data and scales must be matrices");
  bool is_int4 = kind == "int4";
  int64_t bytes = is_int4 ? (depth + 127) / 128 * 64 : depth;
  TORCH_CHECK(group == 32 || group == 64 || group == 128 || (group == 0 && !is_int4), "no groups of ", group);
  int64_t groups = group ? (depth + group - 1) / group : 1;
  TORCH_CHECK(data.element_size() == 1 && data.size(1) == bytes && data.device().is_cpu(), "a depth of ", depth,
              " does not fit weights of ", data.sizes(), " bytes");
  TORCH_CHECK(scales.scalar_type() == at::kBFloat16 && scales.size(0) == data.size(0) && scales.size(1) == groups &&
                  (!zeros || (zeros->sizes() == scales.sizes() && zeros->scalar_type() == at::kByte)),
              "scales ", scales.sizes(), " or zeros do not fit weights of ", data.sizes(), " bytes");
  TORCH_CHECK(data.is_contiguous() && scales.is_contiguous() && (!zeros || zeros->is_contiguous()),
              "the parts of a weight must be contiguous");
  return {bits_of(kind, bool(zeros)), in<uint8_t>(data), in<BFloat16>(scales), in<uint8_t>(zeros)};
}

bool register_inference(torch::Library& library, const std::string& name) {
  if (name == "quantised_linear")
    library.impl("quantised_linear", &quantised_linear_cpu);
  else if (name == "sample_tokens")
    library.impl("sample_tokens", &sample_tokens_cpu);
  else if (name == "log_sum_exp")
    library.impl("log_sum_exp", &log_sum_exp_cpu);
  else
    return false;
  return true;
}

}  // namespace liaoyuan

// The kernels that serve inference alone, as operators of torch's dispatcher; see binding.cpp.
#include <ATen/ops/empty.h>

#include "tensors.h"

namespace liaoyuan {

namespace {

QuantisedBits bits_of(const std::string& kind, bool with_zeros) {
  if (kind == "int8" && !with_zeros) return QuantisedBits::int8;
  if (kind == "fp8" && !with_zeros) return QuantisedBits::fp8;
  TORCH_CHECK(kind == "int4", "no quantised weights of kind ", kind, with_zeros ? " with zeros" : "");
  return with_zeros ? QuantisedBits::int4_zeros : QuantisedBits::int4;
}

void check_quantised(const Tensor& x, const Tensor& data, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& bias, int64_t group, bool is_int4) {
  TORCH_CHECK(x.dim() == 2 && data.dim() == 2 && scales.dim() == 2, "x, data and scales must be matrices");
  int64_t depth = x.size(1), bytes = is_int4 ? (depth + 127) / 128 * 64 : depth;
  TORCH_CHECK(group == 32 || group == 64 || group == 128 || (group == 0 && !is_int4), "no groups of ", group);
  int64_t groups = group ? (depth + group - 1) / group : 1;
  TORCH_CHECK(data.element_size() == 1 && data.size(1) == bytes && data.device().is_cpu(), "x ", x.sizes(),
              " does not fit weights of ", data.sizes(), " bytes");
  TORCH_CHECK(scales.scalar_type() == at::kBFloat16 && scales.size(0) == data.size(0) && scales.size(1) == groups &&
                  (!zeros || (zeros->sizes() == scales.sizes() && zeros->scalar_type() == at::kByte)),
              "scales ", scales.sizes(), " or zeros do not fit weights of ", data.sizes(), " bytes");
  if (bias) same_type(x, *bias);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == data.size(0)), "the bias does not fit the outputs");
}

Tensor quantised_linear_cpu(const Tensor& x_, const Tensor& data_, const Tensor& scales_, const OptionalTensor& zeros_,
                            const OptionalTensor& bias_, std::string kind, int64_t group) {
  check_quantised(x_, data_, scales_, zeros_, bias_, group, kind == "int4");
  Tensor x = dense(x_), data = dense(data_), scales = dense(scales_);
  OptionalTensor zeros = dense(zeros_), bias = dense(bias_);
  Tensor result = at::empty({x.size(0), data.size(0)}, x.options());
  QuantisedWeights weights{bits_of(kind, bool(zeros)), in<uint8_t>(data), in<BFloat16>(scales), in<uint8_t>(zeros)};
  // What lies beyond the depth is read as zero; the groups there have a scale, and x is zero.
  QuantisedShape shape{x.size(0), data.size(0), x.size(1), group, scales.size(1)};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    quantised_linear<T>(weights, in<T>(x), in<T>(bias), out<T>(result), shape);
  });
  return result;
}

}  // namespace

bool register_inference(torch::Library& library, const std::string& name) {
  if (name == "quantised_linear")
    library.impl("quantised_linear", &quantised_linear_cpu);
  else
    return false;
  return true;
}

}  // namespace liaoyuan

// The kernels of an optimiser, as operators of torch's dispatcher; see binding.cpp.
#include <ATen/ops/full.h>

#include "tensors.h"

namespace liaoyuan {

namespace {

void adamw_step_cpu(Tensor& weight, const Tensor& gradient_, Tensor& first, Tensor& second, at::ArrayRef<double> rates,
                    int64_t key, int64_t offset) {
  Tensor gradient = dense(gradient_);
  TORCH_CHECK(weight.sizes() == gradient.sizes() && weight.sizes() == first.sizes() && weight.sizes() == second.sizes(),
              "weight ", weight.sizes(), ", gradient ", gradient.sizes(), " and moments ", first.sizes(), ", ",
              second.sizes(), " differ in shape");
  TORCH_CHECK(weight.is_contiguous() && first.is_contiguous() && second.is_contiguous() && first.device().is_cpu() &&
                  second.device().is_cpu() && gradient.device().is_cpu(),
              "a weight and its moments must be contiguous");
  TORCH_CHECK(first.scalar_type() == at::kFloat && second.scalar_type() == at::kFloat && rates.size() == 7,
              "moments must be float32, and there are 7 rates");
  AdamWStep step{float(rates[0]), float(rates[1]), float(rates[2]), float(rates[3]), float(rates[4]), float(rates[5]),
                 float(rates[6]), uint32_t(key), offset};
  float *m = out<float>(first), *v = out<float>(second);
  int64_t count = weight.numel();
  if (weight.scalar_type() == at::kFloat && gradient.scalar_type() == at::kFloat)
    return adamw_step(out<float>(weight), in<float>(gradient), m, v, count, step);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "no update of ", weight.scalar_type(), " by ",
              gradient.scalar_type());
  by_type(gradient, [&](auto* type) {
    using G = std::remove_pointer_t<decltype(type)>;
    adamw_step(out<BFloat16>(weight), in<G>(gradient), m, v, count, step);
  });
}

Tensor square_sum_cpu(const Tensor& x_) {
  Tensor x = dense(x_);
  double sum = by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return square_sum(in<T>(x), x.numel());
  });
  return at::full({}, sum, x.options().dtype(at::kDouble));
}

Tensor checksum_cpu(const Tensor& bytes_) {
  Tensor bytes = dense(bytes_);
  TORCH_CHECK(bytes.scalar_type() == at::kByte, "a checksum is of bytes, not of ", bytes.scalar_type());
  return at::full({}, int64_t(checksum(in<char>(bytes), bytes.numel())), bytes.options().dtype(at::kLong));
}

}  // namespace

bool register_optimiser(torch::Library& library, const std::string& name) {
  if (name == "adamw_step")
    library.impl("adamw_step", &adamw_step_cpu);
  else if (name == "square_sum")
    library.impl("square_sum", &square_sum_cpu);
  else if (name == "checksum")
    library.impl("checksum", &checksum_cpu);
  else
    return false;
  return true;
}

}  // namespace liaoyuan

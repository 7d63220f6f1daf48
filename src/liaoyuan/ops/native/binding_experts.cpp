// The kernels of mixtures of experts, as operators of torch's dispatcher; see binding.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "tensors.h"

namespace liaoyuan {

namespace {

// ---- grouped_linear

// Where each expert's rows begin, and where the last ones end.
std::vector<int64_t> starts_of(const Tensor& sizes_, int64_t rows, int64_t experts) {
  Tensor sizes = dense(sizes_.to(at::kLong));
  TORCH_CHECK(sizes.dim() == 1 && sizes.size(0) == experts && sizes.device().is_cpu(), "sizes ", sizes.sizes(),
              " must be those of ", experts, " experts");
  std::vector<int64_t> starts(size_t(experts) + 1, 0);
  for (int64_t e = 0; e < experts; ++e) {
    int64_t size = in<int64_t>(sizes)[e];
    TORCH_CHECK(size >= 0 && size <= rows - starts[e], "sizes: expert ", e, " cannot have ", size, " of ", rows, " rows");
    starts[e + 1] = starts[e] + size;
  }
  TORCH_CHECK(starts[experts] == rows, "sizes: the experts have ", starts[experts], " of ", rows, " rows");
  return starts;
}

void check_grouped(const Tensor& x, const Tensor& weight) {
  same_type(x, weight);
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2), "x ", x.sizes(),
              " does not fit the weight ", weight.sizes());
}

// The products of all experts together: product_of(expert, first, count) is that of its rows.
template <class T, class Body>
void over_groups(const std::vector<int64_t>& starts, const Body& product_of) {
  std::vector<Product<T>> products;
  for (size_t e = 0; e + 1 < starts.size(); ++e)
    products.push_back(product_of(int64_t(e), starts[e], starts[e + 1] - starts[e]));
  multiply(products.data(), int64_t(products.size()));
}

Tensor grouped_linear_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& sizes, const OptionalTensor& bias_) {
  check_grouped(x_, weight_);
  Tensor x = dense(x_), weight = dense(weight_);
  OptionalTensor bias = dense(bias_);
  int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(1), experts = weight.size(0);
  std::vector<int64_t> starts = starts_of(sizes, rows, experts);
  if (bias) same_type(x, *bias);
  TORCH_CHECK(!bias || bias->sizes() == at::IntArrayRef({experts, outer}), "bias ", bias->sizes(),
              " does not fit the weight ", weight.sizes());
  Tensor result = at::empty({rows, outer}, x.options());
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_groups<T>(starts, [&](int64_t e, int64_t first, int64_t count) {
      MatrixShape shape{count, outer, inner, false, true, inner, inner, outer};
      return Product<T>{in<T>(x) + first * inner, in<T>(weight) + e * outer * inner, out<T>(result) + first * outer,
                        shape, bias ? in<T>(bias) + e * outer : nullptr};
    });
  });
  return result;
}

Three grouped_linear_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, const Tensor& sizes,
                                  bool with_bias) {
  check_grouped(x_, weight_);
  same_type(x_, grad_);
  int64_t rows = x_.size(0), inner = x_.size(1), outer = weight_.size(1), experts = weight_.size(0);
  TORCH_CHECK(grad_.sizes() == at::IntArrayRef({rows, outer}), "the gradient ", grad_.sizes(), " does not fit");
  std::vector<int64_t> starts = starts_of(sizes, rows, experts);
  Tensor grad = dense(grad_), x = dense(x_), weight = dense(weight_);
  Tensor grad_x = at::empty_like(x), grad_weight = at::empty_like(weight);
  Tensor grad_bias = at::empty({with_bias ? experts : 0, outer}, x.options());
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    over_groups<T>(starts, [&](int64_t e, int64_t first, int64_t count) {
      return Product<T>{in<T>(grad) + first * outer, in<T>(weight) + e * outer * inner, out<T>(grad_x) + first * inner,
                        {count, inner, outer, false, false, outer, inner, inner}};
    });
    over_groups<T>(starts, [&](int64_t e, int64_t first, int64_t count) {
      return Product<T>{in<T>(grad) + first * outer, in<T>(x) + first * inner, out<T>(grad_weight) + e * outer * inner,
                        {outer, inner, count, true, false, outer, inner, inner}};
    });
    if (with_bias) grouped_sum<T>(in<T>(grad), out<T>(grad_bias), {starts.data(), experts}, outer);
  });
  return {grad_x, grad_weight, grad_bias};
}

// ---- route

RouteShape route_shape(const Tensor& logits, int64_t kept, const std::string& scoring, int64_t groups,
                       int64_t kept_groups, int64_t group_best, bool normalise, double scale) {
  TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == at::kFloat && logits.device().is_cpu(),
              "logits must be float32 [tokens, experts]");
  int64_t experts = logits.size(1);
  TORCH_CHECK(scoring == "softmax" || scoring == "sigmoid", "there is no scoring ", scoring);
  TORCH_CHECK(groups > 0 && experts % groups == 0 && kept_groups > 0 && kept_groups <= groups && group_best > 0 &&
                  kept > 0 && kept <= experts / groups * kept_groups,
              kept, " of ", experts, " experts cannot be chosen from ", kept_groups, " of ", groups, " groups");
  return {logits.size(0), experts, kept, groups, kept_groups, group_best, scoring == "sigmoid", normalise, float(scale)};
}

Two route_cpu(const Tensor& logits_, const OptionalTensor& bias_, int64_t kept, std::string scoring, int64_t groups,
              int64_t kept_groups, int64_t group_best, bool normalise, double scale) {
  RouteShape shape = route_shape(logits_, kept, scoring, groups, kept_groups, group_best, normalise, scale);
  Tensor logits = dense(logits_);
  OptionalTensor bias = dense(bias_);
  if (bias) same_type(logits, *bias);
  TORCH_CHECK(!bias || bias->numel() == shape.experts, "bias ", bias->sizes(), " does not fit ", shape.experts, " experts");
  Tensor weights = at::empty({shape.rows, kept}, logits.options());
  Tensor chosen = at::empty({shape.rows, kept}, logits.options().dtype(at::kLong));
  route(in<float>(logits), in<float>(bias), out<float>(weights), out<int64_t>(chosen), shape);
  return {weights, chosen};
}

void check_experts(const Tensor& chosen, int64_t experts) {
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    int64_t expert = in<int64_t>(chosen)[i];
    TORCH_CHECK(expert >= 0 && expert < experts, "there is no expert ", expert, " among ", experts);
  }
}

Tensor route_backward_cpu(const Tensor& grad_, const Tensor& logits_, const Tensor& chosen_, std::string scoring,
                          bool normalise, double scale) {
  Tensor grad = dense(grad_), logits = dense(logits_), chosen = dense(chosen_);
  same_type(logits, grad);
  TORCH_CHECK(chosen.dim() == 2 && chosen.scalar_type() == at::kLong && grad.sizes() == chosen.sizes() &&
                  chosen.size(0) == logits.size(0),
              "the gradient ", grad.sizes(), " does not fit the choice ", chosen.sizes());
  RouteShape shape = route_shape(logits, chosen.size(1), scoring, 1, 1, 1, normalise, scale);
  check_experts(chosen, shape.experts);
  Tensor result = at::empty_like(logits);
  route_backward(in<float>(grad), in<float>(logits), in<int64_t>(chosen), out<float>(result), shape);
  return result;
}

// ---- permute_rows, combine_rows

Three permute_rows_cpu(const Tensor& x_, const Tensor& chosen_, int64_t count) {
  TORCH_CHECK(x_.dim() == 2 && chosen_.dim() == 2 && chosen_.scalar_type() == at::kLong &&
                  chosen_.size(0) == x_.size(0) && x_.device().is_cpu() && count >= 0,
              "x ", x_.sizes(), " does not fit the choice ", chosen_.sizes());
  Tensor x = dense(x_), chosen = dense(chosen_);
  Tensor order = at::empty({chosen.numel()}, chosen.options()), sizes = at::empty({count}, chosen.options());
  TORCH_CHECK(sort_by_expert(in<int64_t>(chosen), chosen.numel(), count, out<int64_t>(order), out<int64_t>(sizes)),
              "chosen names an expert outside 0 ... ", count - 1);
  Tensor rows = at::empty({chosen.numel(), x.size(1)}, x.options());
  gather_rows(in<char>(x), in<int64_t>(order), out<char>(rows), chosen.numel(), chosen.size(1),
              x.size(1) * x.element_size());
  return {rows, order, sizes};
}

Tensor places_in(const Tensor& order_, int64_t rows) {
  Tensor order = dense(order_), places = at::empty_like(order);
  TORCH_CHECK(order.dim() == 1 && order.scalar_type() == at::kLong && order.size(0) == rows &&
                  places_of(in<int64_t>(order), rows, out<int64_t>(places)),
              "order ", order.sizes(), " is no permutation of ", rows, " rows");
  return places;
}

Tensor permute_rows_backward_cpu(const Tensor& grad_, const Tensor& order, int64_t per_token) {
  TORCH_CHECK(grad_.dim() == 2 && per_token > 0 && grad_.size(0) % per_token == 0, "rows ", grad_.sizes(),
              " are not ", per_token, " for each token");
  Tensor grad = dense(grad_), places = places_in(order, grad.size(0));
  Tensor result = at::empty({grad.size(0) / per_token, grad.size(1)}, grad.options());
  by_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    combine_rows<T>(in<T>(grad), in<int64_t>(places), nullptr, out<T>(result), result.size(0), per_token, grad.size(1));
  });
  return result;
}

void check_combine(const Tensor& rows, const Tensor& weights) {
  TORCH_CHECK(rows.dim() == 2 && weights.dim() == 2 && weights.numel() == rows.size(0) &&
                  weights.scalar_type() == at::kFloat && weights.device().is_cpu() && rows.device().is_cpu(),
              "rows ", rows.sizes(), " do not fit weights ", weights.sizes(), " in float32");
}

Tensor combine_rows_cpu(const Tensor& rows_, const Tensor& order, const Tensor& weights_) {
  check_combine(rows_, weights_);
  Tensor rows = dense(rows_), weights = dense(weights_), places = places_in(order, rows.size(0));
  Tensor result = at::empty({weights.size(0), rows.size(1)}, rows.options());
  by_type(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    combine_rows<T>(in<T>(rows), in<int64_t>(places), in<float>(weights), out<T>(result), weights.size(0),
                    weights.size(1), rows.size(1));
  });
  return result;
}

Two combine_rows_backward_cpu(const Tensor& grad_, const Tensor& rows_, const Tensor& order, const Tensor& weights_) {
  check_combine(rows_, weights_);
  same_type(rows_, grad_);
  TORCH_CHECK(grad_.sizes() == at::IntArrayRef({weights_.size(0), rows_.size(1)}), "the gradient ", grad_.sizes(),
              " does not fit");
  Tensor grad = dense(grad_), rows = dense(rows_), weights = dense(weights_), places = places_in(order, rows.size(0));
  Tensor grad_rows = at::empty_like(rows), grad_weights = at::empty_like(weights);
  by_type(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    combine_rows_backward<T>(in<T>(grad), in<T>(rows), in<int64_t>(places), in<float>(weights), out<T>(grad_rows),
                             out<float>(grad_weights), weights.size(0), weights.size(1), rows.size(1));
  });
  return {grad_rows, grad_weights};
}

}  // namespace

bool register_experts(torch::Library& library, const std::string& name) {
  if (name == "grouped_linear") {
    library.impl("grouped_linear", &grouped_linear_cpu);
    library.impl("grouped_linear_backward", &grouped_linear_backward_cpu);
  } else if (name == "route") {
    library.impl("route", &route_cpu);
    library.impl("route_backward", &route_backward_cpu);
  } else if (name == "permute_rows") {
    library.impl("permute_rows", &permute_rows_cpu);
    library.impl("permute_rows_backward", &permute_rows_backward_cpu);
  } else if (name == "combine_rows") {
    library.impl("combine_rows", &combine_rows_cpu);
    library.impl("combine_rows_backward", &combine_rows_backward_cpu);
  } else {
    return false;
  }
  return true;
}

}  // namespace liaoyuan

// The differentiable side of the operators of mixtures of experts; see autograd.cpp.
#include "autograd.h"

namespace liaoyuan {

namespace {

// ---- grouped_linear

Tensor call_grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& sizes, const OptionalTensor& bias) {
  static auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&)>(
      "liaoyuan::grouped_linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, sizes, bias);
}

struct GroupedLinear : Function<GroupedLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& sizes,
                        const OptionalTensor& bias) {
    context->save_for_backward({x, weight, sizes});
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["learned"] = wanted(weight) || wanted(bias);
    return call_grouped_linear(x, weight, sizes, bias);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool)>(
        "liaoyuan::grouped_linear_backward");
    auto saved = context->get_saved_variables();
    bool with_bias = context->saved_data["bias"].toBool();
    if (!context->saved_data["learned"].toBool())  // frozen ones, below adapters
      return {call_grouped_linear(grads[0], saved[1].mT(), saved[2], std::nullopt), Tensor(), Tensor(),
              Tensor()};
    auto [grad_x, grad_weight, grad_bias] = op.call(grads[0], saved[0], saved[1], saved[2], with_bias);
    return {grad_x, grad_weight, Tensor(), with_bias ? grad_bias : Tensor()};
  }
};

Tensor grouped_linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& sizes, const OptionalTensor& bias) {
  return needs_graph(x, weight, bias) ? GroupedLinear::apply(x, weight, sizes, bias)
                                      : call_grouped_linear(x, weight, sizes, bias);
}

// ---- route

Two call_route(const Tensor& logits, const OptionalTensor& bias, int64_t kept, const std::string& scoring,
               int64_t groups, int64_t kept_groups, int64_t group_best, bool normalise, double scale) {
  static auto op = find<Two(const Tensor&, const OptionalTensor&, int64_t, std::string, int64_t, int64_t, int64_t, bool,
                            double)>("liaoyuan::route");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(logits, bias, kept, scoring, groups, kept_groups, group_best, normalise, scale);
}

struct Route : Function<Route> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const OptionalTensor& bias, int64_t kept,
                               const std::string& scoring, int64_t groups, int64_t kept_groups, int64_t group_best,
                               bool normalise, double scale) {
    auto [weights, chosen] =
        call_route(logits, bias, kept, scoring, groups, kept_groups, group_best, normalise, scale);
    context->save_for_backward({logits, chosen});
    context->saved_data["scoring"] = scoring;
    context->saved_data["normalise"] = normalise;
    context->saved_data["scale"] = scale;
    context->mark_non_differentiable({chosen});
    context->set_materialize_grads(false);
    return {weights, chosen};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, std::string, bool, double)>(
        "liaoyuan::route_backward");
    auto saved = context->get_saved_variables();
    variable_list result(9);
    if (grads[0].defined())
      result[0] = op.call(grads[0], saved[0], saved[1], context->saved_data["scoring"].toStringRef(),
                          context->saved_data["normalise"].toBool(), context->saved_data["scale"].toDouble());
    return result;
  }
};

Two route_autograd(const Tensor& logits, const OptionalTensor& bias, int64_t kept, std::string scoring, int64_t groups,
                   int64_t kept_groups, int64_t group_best, bool normalise, double scale) {
  if (!needs_graph(logits))
    return call_route(logits, bias, kept, scoring, groups, kept_groups, group_best, normalise, scale);
  auto outputs = Route::apply(logits, bias, kept, scoring, groups, kept_groups, group_best, normalise, scale);
  return {outputs[0], outputs[1]};
}

// ---- permute_rows, combine_rows

Three call_permute_rows(const Tensor& x, const Tensor& chosen, int64_t count) {
  static auto op = find<Three(const Tensor&, const Tensor&, int64_t)>("liaoyuan::permute_rows");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, chosen, count);
}

struct PermuteRows : Function<PermuteRows> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& chosen, int64_t count) {
    auto [rows, order, sizes] = call_permute_rows(x, chosen, count);
    context->save_for_backward({order});
    context->saved_data["per_token"] = chosen.size(1);
    context->mark_non_differentiable({order, sizes});
    context->set_materialize_grads(false);
    return {rows, order, sizes};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Tensor(const Tensor&, const Tensor&, int64_t)>("liaoyuan::permute_rows_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    Tensor order = context->get_saved_variables()[0];
    return {op.call(grads[0], order, context->saved_data["per_token"].toInt()), Tensor(), Tensor()};
  }
};

Three permute_rows_autograd(const Tensor& x, const Tensor& chosen, int64_t count) {
  if (!needs_graph(x)) return call_permute_rows(x, chosen, count);
  auto outputs = PermuteRows::apply(x, chosen, count);
  return {outputs[0], outputs[1], outputs[2]};
}

Tensor call_combine_rows(const Tensor& rows, const Tensor& order, const Tensor& weights) {
  static auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("liaoyuan::combine_rows");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(rows, order, weights);
}

struct CombineRows : Function<CombineRows> {
  static Tensor forward(AutogradContext* context, const Tensor& rows, const Tensor& order, const Tensor& weights) {
    context->save_for_backward({rows, order, weights});
    return call_combine_rows(rows, order, weights);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
        "liaoyuan::combine_rows_backward");
    auto saved = context->get_saved_variables();
    auto [grad_rows, grad_weights] = op.call(grads[0], saved[0], saved[1], saved[2]);
    return {grad_rows, Tensor(), grad_weights};
  }
};

Tensor combine_rows_autograd(const Tensor& rows, const Tensor& order, const Tensor& weights) {
  return needs_graph(rows, weights) ? CombineRows::apply(rows, order, weights) : call_combine_rows(rows, order, weights);
}

}  // namespace

void register_experts_autograd(torch::Library& library, const std::string& name) {
  if (name == "grouped_linear") library.impl("grouped_linear", &grouped_linear_autograd);
  if (name == "route") library.impl("route", &route_autograd);
  if (name == "permute_rows") library.impl("permute_rows", &permute_rows_autograd);
  if (name == "combine_rows") library.impl("combine_rows", &combine_rows_autograd);
}

}  // namespace liaoyuan

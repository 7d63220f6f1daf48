// The differentiable side of the operators: each calls the dispatcher below autograd, forward and backward, so that
// tracing (fake tensors, torch.compile) sees one operator for each and decode enters no Python.
#include "autograd.h"

namespace liaoyuan {

namespace {

// ---- norm

Tensor call_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  static auto op = find<Tensor(const Tensor&, const Tensor&, double)>("liaoyuan::rms_norm");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, eps);
}

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double eps) {
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    return call_rms_norm(x, weight, eps);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Two(const Tensor&, const Tensor&, const Tensor&, double)>("liaoyuan::rms_norm_backward");
    auto saved = context->get_saved_variables();
    auto [grad_x, grad_weight] = op.call(grads[0], saved[0], saved[1], context->saved_data["eps"].toDouble());
    return {grad_x, grad_weight, Tensor()};
  }
};

Tensor rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps) {
  return needs_graph(x, weight) ? RmsNorm::apply(x, weight, eps) : call_rms_norm(x, weight, eps);
}

Two call_add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  static auto op = find<Two(const Tensor&, const Tensor&, const Tensor&, double)>("liaoyuan::add_rms_norm");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(residual, x, weight, eps);
}

struct AddRmsNorm : Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& residual, const Tensor& x, const Tensor& weight,
                               double eps) {
    auto [total, out] = call_add_rms_norm(residual, x, weight, eps);
    context->save_for_backward({total, weight});
    context->saved_data["eps"] = eps;
    context->set_materialize_grads(false);
    return {total, out};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Two(const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
        "liaoyuan::add_rms_norm_backward");
    auto saved = context->get_saved_variables();
    if (!grads[1].defined()) return {grads[0], grads[0], Tensor(), Tensor()};
    auto [grad, grad_weight] =
        op.call(option_of(grads[0]), grads[1], saved[0], saved[1], context->saved_data["eps"].toDouble());
    return {grad, grad, grad_weight, Tensor()};
  }
};

Two add_rms_norm_autograd(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  if (!needs_graph(residual, x, weight)) return call_add_rms_norm(residual, x, weight, eps);
  auto outputs = AddRmsNorm::apply(residual, x, weight, eps);
  return {outputs[0], outputs[1]};
}

// ---- linear

Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  static auto op =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&)>("liaoyuan::linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, residual);
}

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual) {
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["residual"] = residual.has_value();
    context->saved_data["learned"] = wanted(weight) || wanted(bias);
    return call_linear(x, weight, bias, residual);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, bool)>("liaoyuan::linear_backward");
    auto saved = context->get_saved_variables();
    bool with_bias = context->saved_data["bias"].toBool(), with_residual = context->saved_data["residual"].toBool();
    if (!context->saved_data["learned"].toBool())  // a frozen one, below adapters
      return {call_linear(grads[0], saved[1].t(), std::nullopt, std::nullopt), Tensor(), Tensor(),
              with_residual ? grads[0] : Tensor()};
    auto [grad_x, grad_weight, grad_bias] = op.call(grads[0], saved[0], saved[1], with_bias);
    return {grad_x, grad_weight, with_bias ? grad_bias : Tensor(), with_residual ? grads[0] : Tensor()};
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual) {
  if (!needs_graph(x, weight, bias, residual)) return call_linear(x, weight, bias, residual);
  return Linear::apply(x, weight, bias, residual);
}

// ---- attention

Two call_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& boundaries, double scale,
                   std::optional<int64_t> window, const OptionalTensor& sinks) {
  static auto op = find<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, std::optional<int64_t>,
                            const OptionalTensor&)>("liaoyuan::attention");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, key, value, boundaries, scale, window, sinks);
}

struct Attention : Function<Attention> {
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& boundaries, double scale, std::optional<int64_t> window,
                               const OptionalTensor& sinks) {
    auto [out, log_sum_exp] = call_attention(query, key, value, boundaries, scale, window, sinks);
    context->save_for_backward({query, key, value, boundaries, value_of(sinks), out, log_sum_exp});
    context->saved_data["scale"] = scale;
    context->saved_data["window"] = window;
    context->mark_non_differentiable({log_sum_exp});
    context->set_materialize_grads(false);
    return {out, log_sum_exp};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                               std::optional<int64_t>, const OptionalTensor&, const Tensor&, const Tensor&)>(
        "liaoyuan::attention_backward");
    if (!grads[0].defined()) return variable_list(7);
    auto saved = context->get_saved_variables();
    auto [grad_query, grad_key, grad_value, grad_sinks] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], context->saved_data["scale"].toDouble(),
                context->saved_data["window"].toOptional<int64_t>(), option_of(saved[4]), saved[5], saved[6]);
    Tensor none;
    return {grad_query, grad_key, grad_value, none, none, none, saved[4].defined() ? grad_sinks : none};
  }
};

Two attention_autograd(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& boundaries,
                       double scale, std::optional<int64_t> window, const OptionalTensor& sinks) {
  if (!needs_graph(query, key, value, sinks))
    return call_attention(query, key, value, boundaries, scale, window, sinks);
  auto outputs = Attention::apply(query, key, value, boundaries, scale, window, sinks);
  return {outputs[0], outputs[1]};
}

}  // namespace

void register_autograd(torch::Library& library, const std::string& name) {
  if (name == "rms_norm") library.impl("rms_norm", &rms_norm_autograd);
  if (name == "add_rms_norm") library.impl("add_rms_norm", &add_rms_norm_autograd);
  if (name == "linear") library.impl("linear", &linear_autograd);
  if (name == "attention") library.impl("attention", &attention_autograd);
  register_experts_autograd(library, name);
  register_loss_autograd(library, name);
  register_rows_autograd(library, name);
}

}  // namespace liaoyuan

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

// ---- rotary

Three call_split_rotary(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, int64_t heads, int64_t dim,
                        const OptionalTensor& query_norm, const OptionalTensor& key_norm, double eps) {
  static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, const OptionalTensor&,
                              const OptionalTensor&, double)>("liaoyuan::split_rotary");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps);
}

struct SplitRotary : Function<SplitRotary> {
  static variable_list forward(AutogradContext* context, const Tensor& qkv, const Tensor& cosine, const Tensor& sine,
                               int64_t heads, int64_t dim, const OptionalTensor& query_norm,
                               const OptionalTensor& key_norm, double eps) {
    context->save_for_backward({qkv, cosine, sine, value_of(query_norm), value_of(key_norm)});
    context->saved_data["heads"] = heads;
    context->saved_data["dim"] = dim;
    context->saved_data["eps"] = eps;
    auto [query, key, value] = call_split_rotary(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps);
    return {query, key, value};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&, double)>(
        "liaoyuan::split_rotary_backward");
    auto saved = context->get_saved_variables();
    auto [grad_qkv, grad_query_norm, grad_key_norm] =
        op.call(grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], context->saved_data["heads"].toInt(),
                context->saved_data["dim"].toInt(), option_of(saved[3]), option_of(saved[4]),
                context->saved_data["eps"].toDouble());
    bool normed = saved[3].defined();
    return {grad_qkv, Tensor(), Tensor(), Tensor(), Tensor(), normed ? grad_query_norm : Tensor(),
            normed ? grad_key_norm : Tensor(), Tensor()};
  }
};

Three split_rotary_autograd(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, int64_t heads, int64_t dim,
                            const OptionalTensor& query_norm, const OptionalTensor& key_norm, double eps) {
  if (!needs_graph(qkv, query_norm, key_norm))
    return call_split_rotary(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps);
  auto outputs = SplitRotary::apply(qkv, cosine, sine, heads, dim, query_norm, key_norm, eps);
  return {outputs[0], outputs[1], outputs[2]};
}

// ---- swiglu

Tensor call_swiglu(const Tensor& gate_up) {
  static auto op = find<Tensor(const Tensor&)>("liaoyuan::swiglu");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(gate_up);
}

struct SwiGlu : Function<SwiGlu> {
  static Tensor forward(AutogradContext* context, const Tensor& gate_up) {
    context->save_for_backward({gate_up});
    return call_swiglu(gate_up);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Tensor(const Tensor&, const Tensor&)>("liaoyuan::swiglu_backward");
    return {op.call(grads[0], context->get_saved_variables()[0])};
  }
};

Tensor swiglu_autograd(const Tensor& gate_up) {
  return needs_graph(gate_up) ? SwiGlu::apply(gate_up) : call_swiglu(gate_up);
}

// ---- linear

Tensor call_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  static auto op = find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>("liaoyuan::linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias);
}

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value();
    return call_linear(x, weight, bias);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, bool)>("liaoyuan::linear_backward");
    auto saved = context->get_saved_variables();
    bool with_bias = context->saved_data["bias"].toBool();
    auto [grad_x, grad_weight, grad_bias] = op.call(grads[0], saved[0], saved[1], with_bias);
    return {grad_x, grad_weight, with_bias ? grad_bias : Tensor()};
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return needs_graph(x, weight, bias) ? Linear::apply(x, weight, bias) : call_linear(x, weight, bias);
}

// ---- token_log_prob

Three call_token_log_prob(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool keep) {
  static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, bool)>("liaoyuan::token_log_prob");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(hidden, weight, targets, keep);
}

struct TokenLogProb : Function<TokenLogProb> {
  static variable_list forward(AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                               const Tensor& targets, bool keep) {
    auto [log_prob, log_sum_exp, kept] = call_token_log_prob(hidden, weight, targets, keep);
    context->save_for_backward({hidden, weight, targets, log_sum_exp, kept});
    context->mark_non_differentiable({log_sum_exp, kept});
    context->set_materialize_grads(false);  // or a zero gradient of all logits would be filled
    return {log_prob, log_sum_exp, kept};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&)>("liaoyuan::token_log_prob_backward");
    if (!grads[0].defined()) return variable_list(4);
    auto saved = context->get_saved_variables();
    auto [grad_hidden, grad_weight] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {grad_hidden, grad_weight, Tensor(), Tensor()};
  }
};

Three token_log_prob_autograd(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool keep) {
  if (!needs_graph(hidden, weight)) return call_token_log_prob(hidden, weight, targets, false);
  auto outputs = TokenLogProb::apply(hidden, weight, targets, keep);
  return {outputs[0], outputs[1], outputs[2]};
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
  if (name == "split_rotary") library.impl("split_rotary", &split_rotary_autograd);
  if (name == "swiglu") library.impl("swiglu", &swiglu_autograd);
  if (name == "linear") library.impl("linear", &linear_autograd);
  if (name == "token_log_prob") library.impl("token_log_prob", &token_log_prob_autograd);
  if (name == "attention") library.impl("attention", &attention_autograd);
  register_experts_autograd(library, name);
}

}  // namespace liaoyuan

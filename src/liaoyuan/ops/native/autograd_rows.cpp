// The differentiable side of rotary embedding and gated activations, as in autograd.cpp.
#include "autograd.h"

namespace liaoyuan {

namespace {

// ---- split_rotary

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

// ---- latent_rotary

Three call_latent_rotary(const Tensor& query, const Tensor& expanded, const Tensor& shared, const Tensor& cosine,
                         const Tensor& sine, int64_t heads) {
  static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t)>(
      "liaoyuan::latent_rotary");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, expanded, shared, cosine, sine, heads);
}

struct LatentRotary : Function<LatentRotary> {
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& expanded,
                               const Tensor& shared, const Tensor& cosine, const Tensor& sine, int64_t heads) {
    context->save_for_backward({cosine, sine});
    auto [turned, key, value] = call_latent_rotary(query, expanded, shared, cosine, sine, heads);
    return {turned, key, value};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
        "liaoyuan::latent_rotary_backward");
    auto saved = context->get_saved_variables();
    auto [grad_query, grad_expanded, grad_shared] = op.call(grads[0], grads[1], grads[2], saved[0], saved[1]);
    return {grad_query, grad_expanded, grad_shared, Tensor(), Tensor(), Tensor()};
  }
};

Three latent_rotary_autograd(const Tensor& query, const Tensor& expanded, const Tensor& shared, const Tensor& cosine,
                             const Tensor& sine, int64_t heads) {
  if (!needs_graph(query, expanded, shared)) return call_latent_rotary(query, expanded, shared, cosine, sine, heads);
  auto outputs = LatentRotary::apply(query, expanded, shared, cosine, sine, heads);
  return {outputs[0], outputs[1], outputs[2]};
}

// ---- gated activations: each has a name, and numbers behind gate_up

struct SwiGlu {
  static constexpr const char *forward = "liaoyuan::swiglu", *backward = "liaoyuan::swiglu_backward";
};
struct GeGlu {
  static constexpr const char *forward = "liaoyuan::geglu", *backward = "liaoyuan::geglu_backward";
};
struct ClampedSwiGlu {
  static constexpr const char *forward = "liaoyuan::clamped_swiglu", *backward = "liaoyuan::clamped_swiglu_backward";
};

template <class Name, class... Numbers>
Tensor call_gated(const Tensor& gate_up, Numbers... numbers) {
  static auto op = find<Tensor(const Tensor&, Numbers...)>(Name::forward);
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(gate_up, numbers...);
}

template <class Name, class... Numbers>
struct Gated : Function<Gated<Name, Numbers...>> {
  static Tensor forward(AutogradContext* context, const Tensor& gate_up, Numbers... numbers) {
    context->save_for_backward({gate_up});
    context->saved_data["numbers"] = c10::ivalue::Tuple::create(std::vector<c10::IValue>{numbers...});
    return call_gated<Name>(gate_up, numbers...);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    return backward_with(context, grads, std::index_sequence_for<Numbers...>{});
  }
  template <size_t... places>
  static variable_list backward_with(AutogradContext* context, const variable_list& grads,
                                     std::index_sequence<places...>) {
    static auto op = find<Tensor(const Tensor&, const Tensor&, Numbers...)>(Name::backward);
    auto numbers = context->saved_data["numbers"].toTuple();
    Tensor gate_up = context->get_saved_variables()[0];
    Tensor found = op.call(grads[0], gate_up, numbers->elements()[places].template to<Numbers>()...);
    return {found, (void(places), Tensor())...};
  }
};

template <class Name, class... Numbers>
Tensor gated_autograd(const Tensor& gate_up, Numbers... numbers) {
  if (!needs_graph(gate_up)) return call_gated<Name>(gate_up, numbers...);
  return Gated<Name, Numbers...>::apply(gate_up, numbers...);
}

}  // namespace

void register_rows_autograd(torch::Library& library, const std::string& name) {
  if (name == "split_rotary") library.impl("split_rotary", &split_rotary_autograd);
  if (name == "latent_rotary") library.impl("latent_rotary", &latent_rotary_autograd);
  if (name == "swiglu") library.impl("swiglu", &gated_autograd<SwiGlu>);
  if (name == "geglu") library.impl("geglu", &gated_autograd<GeGlu, bool>);
  if (name == "clamped_swiglu") library.impl("clamped_swiglu", &gated_autograd<ClampedSwiGlu, double, double>);
}

}  // namespace liaoyuan

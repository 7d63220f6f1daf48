// Kernels of single rows of activations, rotary embedding and gated activations, as operators of torch's dispatcher.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "operators.h"
#include "tensors.h"

namespace liaoyuan {

namespace {

// ---- split_rotary

void check_angles(const Tensor& cosine, const Tensor& sine, int64_t rows, int64_t dim) {
  TORCH_CHECK(dim > 0 && dim <= 512 && dim % 2 == 0, "a head of ", dim, " rotated dimensions is not supported");
  for (const Tensor& angle : {cosine, sine})
    TORCH_CHECK(angle.scalar_type() == at::kFloat && angle.dim() == 2 && angle.size(0) == rows &&
                    angle.size(1) == dim / 2,
                "the angles must be float32 [", rows, ", ", dim / 2, "], not ", angle.scalar_type(), " ",
                angle.sizes());
}

RotaryShape rotary_shape(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const OptionalTensor& query_norm,
                         const OptionalTensor& key_norm, int64_t key_heads, int64_t dim, double eps) {
  TORCH_CHECK(qkv.dim() == 2 && dim > 0 && key_heads > 0 && qkv.size(1) % (key_heads * dim) == 0 &&
                  qkv.size(1) / (key_heads * dim) > 2,
              "the merged projection ", qkv.sizes(), " does not fit ", key_heads, " key heads of ", dim);
  check_angles(cosine, sine, qkv.size(0), dim);
  TORCH_CHECK(query_norm.has_value() == key_norm.has_value(), "both heads are normalised, or none");
  if (query_norm)
    for (const Tensor& norm : {*query_norm, *key_norm}) {
      same_type(qkv, norm);
      TORCH_CHECK(norm.numel() == dim, "a norm's weight does not fit the head");
    }
  return {qkv.size(0), key_heads, qkv.size(1) / (key_heads * dim) - 2, dim, float(eps)};
}

Three split_rotary_cpu(const Tensor& qkv_, const Tensor& cosine_, const Tensor& sine_, int64_t key_heads, int64_t dim,
                       const OptionalTensor& query_norm_, const OptionalTensor& key_norm_, double eps) {
  RotaryShape shape = rotary_shape(qkv_, cosine_, sine_, query_norm_, key_norm_, key_heads, dim, eps);
  Tensor qkv = dense(qkv_), cosine = dense(cosine_), sine = dense(sine_);
  OptionalTensor query_norm = dense(query_norm_), key_norm = dense(key_norm_);
  Tensor query = at::empty({shape.rows, key_heads * shape.groups, dim}, qkv.options());
  Tensor key = at::empty({shape.rows, key_heads, dim}, qkv.options()), value = at::empty_like(key);
  by_type(qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    split_rotary<T>(in<T>(qkv), in<float>(cosine), in<float>(sine), in<T>(query_norm), in<T>(key_norm), out<T>(query),
                    out<T>(key), out<T>(value), shape);
  });
  return {query, key, value};
}

Three split_rotary_backward_cpu(const Tensor& grad_query_, const Tensor& grad_key_, const Tensor& grad_value_,
                                const Tensor& qkv_, const Tensor& cosine_, const Tensor& sine_, int64_t key_heads,
                                int64_t dim, const OptionalTensor& query_norm_, const OptionalTensor& key_norm_,
                                double eps) {
  RotaryShape shape = rotary_shape(qkv_, cosine_, sine_, query_norm_, key_norm_, key_heads, dim, eps);
  Tensor qkv = dense(qkv_), cosine = dense(cosine_), sine = dense(sine_), grad_query = dense(grad_query_);
  Tensor grad_key = dense(grad_key_), grad_value = dense(grad_value_);
  for (const Tensor& grad : {grad_query, grad_key, grad_value}) same_type(qkv, grad);
  TORCH_CHECK(grad_query.numel() == shape.rows * key_heads * shape.groups * dim &&
                  grad_key.numel() == shape.rows * key_heads * dim && grad_value.numel() == grad_key.numel(),
              "a gradient does not fit");
  OptionalTensor query_norm = dense(query_norm_), key_norm = dense(key_norm_);
  int64_t norm_size = query_norm ? dim : 0;
  Tensor grad_qkv = at::empty_like(qkv), grad_query_norm = at::empty({norm_size}, qkv.options());
  Tensor grad_key_norm = at::empty({norm_size}, qkv.options());
  by_type(qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    split_rotary_backward<T>(in<T>(grad_query), in<T>(grad_key), in<T>(grad_value), in<T>(qkv), in<float>(cosine),
                             in<float>(sine), in<T>(query_norm), in<T>(key_norm), out<T>(grad_qkv),
                             out<T>(grad_query_norm), out<T>(grad_key_norm), shape);
  });
  return {grad_qkv, grad_query_norm, grad_key_norm};
}

// ---- latent_rotary

LatentShape latent_shape(const Tensor& query, const Tensor& expanded, const Tensor& shared, const Tensor& cosine,
                         const Tensor& sine, int64_t heads) {
  same_type(query, expanded);
  same_type(query, shared);
  TORCH_CHECK(query.dim() == 2 && expanded.dim() == 2 && shared.dim() == 2 && heads > 0 &&
                  query.size(0) == expanded.size(0) && query.size(0) == shared.size(0) && query.size(1) % heads == 0 &&
                  expanded.size(1) % heads == 0,
              "query ", query.sizes(), ", expanded ", expanded.sizes(), " and shared ", shared.sizes(), " do not fit ",
              heads, " heads");
  int64_t turned = shared.size(1), own = query.size(1) / heads - turned, value_dim = expanded.size(1) / heads - own;
  TORCH_CHECK(own >= 0 && value_dim >= 0, "query ", query.sizes(), ", expanded ", expanded.sizes(), " and shared ",
              shared.sizes(), " do not fit ", heads, " heads");
  check_angles(cosine, sine, query.size(0), turned);
  return {query.size(0), heads, own, turned, value_dim};
}

Three latent_rotary_cpu(const Tensor& query_, const Tensor& expanded_, const Tensor& shared_, const Tensor& cosine_,
                        const Tensor& sine_, int64_t heads) {
  LatentShape s = latent_shape(query_, expanded_, shared_, cosine_, sine_, heads);
  Tensor query = dense(query_), expanded = dense(expanded_), shared = dense(shared_);
  Tensor cosine = dense(cosine_), sine = dense(sine_);
  Tensor turned = at::empty({s.rows, heads, s.own + s.turned}, query.options()), key = at::empty_like(turned);
  Tensor value = at::empty({s.rows, heads, s.value_dim}, query.options());
  by_type(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    latent_rotary<T>(in<T>(query), in<T>(expanded), in<T>(shared), in<float>(cosine), in<float>(sine), out<T>(turned),
                     out<T>(key), out<T>(value), s);
  });
  return {turned, key, value};
}

Three latent_rotary_backward_cpu(const Tensor& grad_query_, const Tensor& grad_key_, const Tensor& grad_value_,
                                 const Tensor& cosine_, const Tensor& sine_) {
  same_shape(grad_query_, grad_key_);
  same_type(grad_query_, grad_value_);
  TORCH_CHECK(grad_key_.dim() == 3 && grad_value_.dim() == 3 && grad_key_.size(0) == grad_value_.size(0) &&
                  grad_key_.size(1) == grad_value_.size(1) && cosine_.dim() == 2,
              "the gradients of keys ", grad_key_.sizes(), " and values ", grad_value_.sizes(), " do not fit");
  int64_t rows = grad_key_.size(0), heads = grad_key_.size(1), turned = 2 * cosine_.size(1);
  check_angles(cosine_, sine_, rows, turned);
  LatentShape s{rows, heads, grad_key_.size(2) - turned, turned, grad_value_.size(2)};
  TORCH_CHECK(s.own >= 0, "heads of ", grad_key_.size(2), " have fewer than ", turned, " dimensions");
  Tensor grad_query = dense(grad_query_), grad_key = dense(grad_key_), grad_value = dense(grad_value_);
  Tensor cosine = dense(cosine_), sine = dense(sine_);
  auto options = grad_key.options();
  Tensor query = at::empty({rows, heads * (s.own + turned)}, options), shared = at::empty({rows, turned}, options);
  Tensor expanded = at::empty({rows, heads * (s.own + s.value_dim)}, options);
  by_type(grad_key, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    latent_rotary_backward<T>(in<T>(grad_query), in<T>(grad_key), in<T>(grad_value), in<float>(cosine), in<float>(sine),
                              out<T>(query), out<T>(expanded), out<T>(shared), s);
  });
  return {query, expanded, shared};
}

// ---- gated activations

Tensor gated_cpu(const Tensor& gate_up_, const GateKind& kind) {
  TORCH_CHECK(gate_up_.dim() == 2 && gate_up_.size(1) % 2 == 0, "gate_up ", gate_up_.sizes(), " is no pairs");
  Tensor gate_up = dense(gate_up_), result = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  by_type(gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gated<T>(in<T>(gate_up), out<T>(result), result.numel(), kind);
  });
  return result;
}

Tensor gated_backward_cpu(const Tensor& grad_, const Tensor& gate_up_, const GateKind& kind) {
  same_type(grad_, gate_up_);
  TORCH_CHECK(gate_up_.dim() == 2 && grad_.numel() * 2 == gate_up_.numel(), "a gradient of ", grad_.sizes(),
              " does not fit gate_up ", gate_up_.sizes());
  Tensor grad = dense(grad_), gate_up = dense(gate_up_), result = at::empty_like(gate_up);
  by_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gated_backward<T>(in<T>(grad), in<T>(gate_up), out<T>(result), grad.numel(), kind);
  });
  return result;
}

GateKind gelu_kind(bool approximate) { return {approximate ? GateKind::gelu_tanh : GateKind::gelu, 0.0f, 0.0f}; }
GateKind clamped_kind(double limit, double alpha) { return {GateKind::clamped_silu, float(limit), float(alpha)}; }
constexpr GateKind SILU{GateKind::silu, 0.0f, 0.0f};

Tensor swiglu_cpu(const Tensor& gate_up) { return gated_cpu(gate_up, SILU); }
Tensor swiglu_backward_cpu(const Tensor& grad, const Tensor& gate_up) {
  return gated_backward_cpu(grad, gate_up, SILU);
}
Tensor geglu_cpu(const Tensor& gate_up, bool approximate) { return gated_cpu(gate_up, gelu_kind(approximate)); }
Tensor geglu_backward_cpu(const Tensor& grad, const Tensor& gate_up, bool approximate) {
  return gated_backward_cpu(grad, gate_up, gelu_kind(approximate));
}
Tensor clamped_swiglu_cpu(const Tensor& gate_up, double limit, double alpha) {
  return gated_cpu(gate_up, clamped_kind(limit, alpha));
}
Tensor clamped_swiglu_backward_cpu(const Tensor& grad, const Tensor& gate_up, double limit, double alpha) {
  return gated_backward_cpu(grad, gate_up, clamped_kind(limit, alpha));
}

}  // namespace

bool register_rows(torch::Library& library, const std::string& name) {
  if (name == "split_rotary") {
    library.impl("split_rotary", &split_rotary_cpu);
    library.impl("split_rotary_backward", &split_rotary_backward_cpu);
  } else if (name == "latent_rotary") {
    library.impl("latent_rotary", &latent_rotary_cpu);
    library.impl("latent_rotary_backward", &latent_rotary_backward_cpu);
  } else if (name == "swiglu") {
    library.impl("swiglu", &swiglu_cpu);
    library.impl("swiglu_backward", &swiglu_backward_cpu);
  } else if (name == "geglu") {
    library.impl("geglu", &geglu_cpu);
    library.impl("geglu_backward", &geglu_backward_cpu);
  } else if (name == "clamped_swiglu") {
    library.impl("clamped_swiglu", &clamped_swiglu_cpu);
    library.impl("clamped_swiglu_backward", &clamped_swiglu_backward_cpu);
  } else {
    return false;
  }
  return true;
}

}  // namespace liaoyuan

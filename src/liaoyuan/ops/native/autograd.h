// What the files that make operators differentiable share.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "operators.h"

namespace liaoyuan {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool wanted(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool wanted(const OptionalTensor& tensor) { return tensor && wanted(*tensor); }
template <class... Inputs>
bool needs_graph(const Inputs&... inputs) {
  return at::GradMode::is_enabled() && (wanted(inputs) || ...);
}

inline Tensor value_of(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }
inline OptionalTensor option_of(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace liaoyuan

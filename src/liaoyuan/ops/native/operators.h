// What the files that know torch share: tensors as the kernels take them, and what a file registers.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace liaoyuan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Call body with a null pointer of the kernels' type for this dtype.
template <class Body>
auto by_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kFloat) return body(static_cast<float*>(nullptr));
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16, "the native kernels take float32 and bfloat16, not ",
              tensor.scalar_type());
  return body(static_cast<BFloat16*>(nullptr));
}

template <class T>
const T* in(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T>
const T* in(const OptionalTensor& tensor) { return tensor ? in<T>(*tensor) : nullptr; }
template <class T>
T* out(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(); }
inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

inline void same_type(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && b.device().is_cpu(), "dtypes or devices differ: ",
              a.scalar_type(), " and ", b.scalar_type());
}
inline void same_shape(const Tensor& a, const Tensor& b) {
  same_type(a, b);
  TORCH_CHECK(a.sizes() == b.sizes(), "shapes differ: ", a.sizes(), " and ", b.sizes());
}

// Register the kernels of the operator `name` if it is one of attention's; returns whether.
bool register_attention(torch::Library& library, const std::string& name);

// Register the differentiable side of the operator `name`; does nothing for operators without one.
void register_autograd(torch::Library& library, const std::string& name);

}  // namespace liaoyuan

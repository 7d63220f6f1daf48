// Tensors as the kernels want them: contiguous, by pointer, of a known type. For the files that bind kernels to torch.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "operators.h"

namespace liaoyuan {

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
inline void same_type(const Tensor& a, const OptionalTensor& b) {
  if (b) same_type(a, *b);
}
// Without a copy of any: to count one costs as much as all else that is done with it here.
template <class... Others>
void same_types(const Tensor& a, const Others&... others) { (same_type(a, others), ...); }
inline void same_shape(const Tensor& a, const Tensor& b) {
  same_type(a, b);
  TORCH_CHECK(a.sizes() == b.sizes(), "shapes differ: ", a.sizes(), " and ", b.sizes());
}

}  // namespace liaoyuan

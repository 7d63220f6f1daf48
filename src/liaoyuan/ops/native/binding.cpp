// The kernels as operators of torch's dispatcher, for CPU tensors.
//
// The schemas belong to Python (torch.library). `liaoyuan_native::use(name, on)` registers this library's kernels of
// one operator, or takes them away: so Python decides, after the self-test. Inputs are checked here as far as memory
// safety asks; what the kernels do not take (other dtypes, devices) Python gives to the reference.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>

#include "kernels.h"
#include "operators.h"
#include "tensors.h"

namespace liaoyuan {

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run_tasks(int64_t tasks, const void* body, void (*task)(const void*, int64_t)) {
  int64_t workers = std::min(tasks, threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(body, i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(body, i);
  });
}

void run_ranges(int64_t tasks, const void* body, void (*task)(const void*, int64_t)) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t MOST = 256;
  int64_t workers = std::min({tasks, threads(), MOST});
  if (workers <= 1) return run_tasks(tasks, body, task);
  Range ranges[MOST];
  for (int64_t w = 0; w < workers; ++w) ranges[w].next = tasks * w / workers, ranges[w].end = tasks * (w + 1) / workers;
  at::parallel_for(0, workers, 1, [&](int64_t own, int64_t) {
    for (int64_t other = 0; other < workers; ++other) {
      Range& range = ranges[(own + other) % workers];
      for (int64_t i = range.next++; i < range.end; i = range.next++) task(body, i);
    }
  });
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[5];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.size);
    TORCH_CHECK_WITH(OutOfMemoryError, buffer.data, "no memory for a buffer of ", buffer.size, " bytes");
  }
  return buffer.data;
}

namespace {

// ---- norm

void check_norm(const Tensor& x, const Tensor& weight) {
  same_type(x, weight);
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0), "the weight does not fit the rows");
}

int64_t rows_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

Tensor rms_norm_cpu(const Tensor& x_, const Tensor& weight_, double eps) {
  check_norm(x_, weight_);
  Tensor x = dense(x_), weight = dense(weight_), result = at::empty_like(x);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm<T>(nullptr, in<T>(x), in<T>(weight), nullptr, out<T>(result), rows_of(x), x.size(-1), float(eps));
  });
  return result;
}

Two norm_gradients(const OptionalTensor& grad_total_, const Tensor& grad_, const Tensor& total_, const Tensor& weight_,
                   double eps) {
  check_norm(total_, weight_);
  same_shape(grad_, total_);
  Tensor grad = dense(grad_), total = dense(total_), weight = dense(weight_);
  OptionalTensor grad_total = dense(grad_total_);
  if (grad_total) same_shape(*grad_total, total);
  Tensor grad_in = at::empty_like(total), grad_weight = at::empty_like(weight);
  by_type(total, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm_backward<T>(in<T>(grad_total), in<T>(grad), in<T>(total), in<T>(weight), out<T>(grad_in),
                         out<T>(grad_weight), rows_of(total), total.size(-1), float(eps));
  });
  return {grad_in, grad_weight};
}

Two rms_norm_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps) {
  return norm_gradients(std::nullopt, grad, x, weight, eps);
}

Two add_rms_norm_cpu(const Tensor& residual_, const Tensor& x_, const Tensor& weight_, double eps) {
  check_norm(x_, weight_);
  same_shape(residual_, x_);
  Tensor residual = dense(residual_), x = dense(x_), weight = dense(weight_);
  Tensor total = at::empty_like(x), result = at::empty_like(x);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm<T>(in<T>(residual), in<T>(x), in<T>(weight), out<T>(total), out<T>(result), rows_of(x), x.size(-1),
                float(eps));
  });
  return {total, result};
}

// ---- linear

// a b^T (+ bias), rounded once: a [rows, depth], b [columns, depth].
template <class T>
void rows_product(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& residual,
                  const Tensor& result) {
  int64_t depth = a.size(1), columns = b.size(0);
  MatrixShape shape{a.size(0), columns, depth, false, true, depth, depth, columns};
  multiply<T>({in<T>(a), in<T>(b), out<T>(result), shape, in<T>(bias), in<T>(residual)});
}

Tensor linear_cpu(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
                  const OptionalTensor& residual_) {
  same_type(x_, weight_);
  TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 2 && x_.size(1) == weight_.size(1), "x ", x_.sizes(),
              " does not fit the weight ", weight_.sizes());
  Tensor x = dense(x_), weight = dense(weight_);
  OptionalTensor bias = dense(bias_), residual = dense(residual_);
  Tensor result = at::empty({x.size(0), weight.size(0)}, x.options());
  if (bias) same_type(x, *bias);
  TORCH_CHECK(!bias || bias->sizes() == weight.sizes().slice(0, 1), "bias ", bias->sizes(),
              " does not fit the weight ", weight.sizes());
  if (residual) same_shape(result, *residual);
  by_type(x, [&](auto* type) {
    rows_product<std::remove_pointer_t<decltype(type)>>(x, weight, bias, residual, result);
  });
  return result;
}

Three linear_backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, bool with_bias) {
  same_type(x_, weight_);
  same_type(x_, grad_);
  TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 2 && grad_.dim() == 2 && grad_.size(0) == x_.size(0) &&
                  grad_.size(1) == weight_.size(0) && x_.size(1) == weight_.size(1),
              "the gradient ", grad_.sizes(), " does not fit x ", x_.sizes(), " and the weight ", weight_.sizes());
  Tensor grad = dense(grad_), x = dense(x_), weight = dense(weight_);
  Tensor grad_x = at::empty_like(x), grad_weight = at::empty_like(weight);
  int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    multiply<T>({in<T>(grad), in<T>(weight), out<T>(grad_x), {rows, inner, outer, false, false, outer, inner, inner}});
    multiply<T>({in<T>(grad), in<T>(x), out<T>(grad_weight), {outer, inner, rows, true, false, outer, inner, inner}});
  });
  return {grad_x, grad_weight, with_bias ? at::sum(grad, 0) : at::empty({0}, x.options())};
}

// ---- choice

void register_kernels(torch::Library& library, const std::string& name) {
  if (name == "rms_norm") {
    library.impl("rms_norm", &rms_norm_cpu);
    library.impl("rms_norm_backward", &rms_norm_backward_cpu);
  } else if (name == "add_rms_norm") {
    library.impl("add_rms_norm", &add_rms_norm_cpu);
    library.impl("add_rms_norm_backward", &norm_gradients);
  } else if (name == "linear") {
    library.impl("linear", &linear_cpu);
    library.impl("linear_backward", &linear_backward_cpu);
  } else if (!register_attention(library, name) && !register_experts(library, name) &&
             !register_inference(library, name) && !register_optimiser(library, name) && !register_loss(library, name) &&
             !register_rows(library, name) && !register_layer(library, name)) {
    TORCH_CHECK(false, "there is no native kernel called ", name);
  }
}

void use(std::string name, bool on) {
  static std::map<std::string, std::vector<std::unique_ptr<torch::Library>>> in_use;
  in_use.erase(name);
  if (!on) return;
  auto& libraries = in_use[name];
  for (auto key : {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU})
    libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "liaoyuan", key, __FILE__, __LINE__));
  register_kernels(*libraries[0], name);
  register_autograd(*libraries[1], name);
}

}  // namespace

TORCH_LIBRARY(liaoyuan_native, library) { 
  library.def("use(str name, bool on) -> ()", &use);
  define_recording(library);
}

}  // namespace liaoyuan

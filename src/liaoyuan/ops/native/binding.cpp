// The kernels as operators of torch's dispatcher, for CPU tensors.
//
// The schemas belong to Python (torch.library). `liaoyuan_native::use(name, on)` registers this library's kernels of
// one operator, or takes them away: so Python decides, after the self-test. Inputs are checked here as far as memory
// safety asks; what the kernels do not take (other dtypes, devices) Python gives to the reference.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
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

void run_tasks(int64_t tasks, const void* body, void (*task)(const void*, int64_t)) {
  int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(tasks, at::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(body, i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(body, i);
  });
}

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[4];
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

// ---- rotary

RotaryShape rotary_shape(const Tensor& qkv, const Tensor& cosine, const Tensor& sine, const OptionalTensor& query_norm,
                         const OptionalTensor& key_norm, int64_t key_heads, int64_t dim, double eps) {
  TORCH_CHECK(qkv.dim() == 2 && dim > 0 && dim <= 512 && dim % 2 == 0 && key_heads > 0 &&
                  qkv.size(1) % (key_heads * dim) == 0 && qkv.size(1) / (key_heads * dim) > 2,
              "the merged projection does not fit its heads");
  for (const Tensor& angle : {cosine, sine})
    TORCH_CHECK(angle.scalar_type() == at::kFloat && angle.dim() == 2 && angle.size(0) == qkv.size(0) &&
                    angle.size(1) == dim / 2,
                "the angles must be float32 of shape [tokens, dim / 2]");
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

// ---- swiglu

Tensor swiglu_cpu(const Tensor& gate_up_) {
  TORCH_CHECK(gate_up_.dim() == 2 && gate_up_.size(1) % 2 == 0, "gate and up must alternate in the last dimension");
  Tensor gate_up = dense(gate_up_), result = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  by_type(gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    swiglu<T>(in<T>(gate_up), out<T>(result), result.size(0), result.size(1));
  });
  return result;
}

Tensor swiglu_backward_cpu(const Tensor& grad_, const Tensor& gate_up_) {
  same_type(grad_, gate_up_);
  Tensor grad = dense(grad_), gate_up = dense(gate_up_), result = at::empty_like(gate_up);
  TORCH_CHECK(gate_up.dim() == 2 && grad.numel() * 2 == gate_up.numel(), "the gradient does not fit");
  by_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    swiglu_backward<T>(in<T>(grad), in<T>(gate_up), out<T>(result), gate_up.size(0), gate_up.size(1) / 2);
  });
  return result;
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

// ---- token_log_prob

// Products by torch, through fp32 where that is faster; the result is rounded once, as there.
bool through_fp32(const Tensor& like) {
  static const bool slow = bf16_is_slow();
  return slow && like.scalar_type() == at::kBFloat16;
}
void product_into(Tensor& out, const Tensor& a, const Tensor& b) {
  if (through_fp32(a))
    out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
  else
    at::mm_out(out, a, b);
}

// grad^T x: torch's own product for this storage order is two to three times slower in bf16.
void weight_gradient(const Tensor& out_, const Tensor& grad, const Tensor& x) {
  int64_t rows = grad.size(0), outer = grad.size(1), inner = x.size(1);
  if (grad.scalar_type() == at::kBFloat16 && out_.is_contiguous()) {
    MatrixShape shape{outer, inner, rows, true, false, outer, inner, inner};
    return multiply<BFloat16>({in<BFloat16>(grad), in<BFloat16>(x), out<BFloat16>(out_), shape});
  }
  Tensor result = out_;
  product_into(result, grad.t(), x);
}

constexpr int64_t CHUNK_ELEMENTS = 1 << 22;  // of logits at a time: 8 MiB in bf16

Tensor chunk_buffer(int64_t rows, int64_t columns, const Tensor& like) {
  void* data = scratch(2, size_t(rows * columns) * like.element_size());
  return at::from_blob(data, {rows, columns}, like.options().requires_grad(false));
}

int64_t chunk_columns(int64_t rows, int64_t vocabulary) {
  int64_t columns = std::max<int64_t>(256, CHUNK_ELEMENTS / std::max<int64_t>(rows, 1) / 64 * 64);
  return std::min(columns, vocabulary);
}

void check_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  same_type(hidden, weight);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1), "the head does not fit");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.size(0) == hidden.size(0),
              "targets must be int64 [tokens]");
}

Three token_log_prob_cpu(const Tensor& hidden_, const Tensor& weight_, const Tensor& targets_, bool keep) {
  check_head(hidden_, weight_, targets_);
  Tensor hidden = dense(hidden_), weight = dense(weight_), targets = dense(targets_);
  int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  const int64_t* target = in<int64_t>(targets);
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK(target[i] >= 0 && target[i] < vocabulary, "target ", target[i], " is not in the vocabulary");
  auto real = hidden.options().dtype(at::kFloat);
  Tensor state = at::empty({rows, 3}, real), log_prob = at::empty({rows}, real), log_sum_exp = at::empty({rows}, real);
  Tensor kept = at::empty({keep ? rows : 0, vocabulary}, hidden.options());
  int64_t step = keep ? vocabulary : chunk_columns(rows, vocabulary);
  for (int64_t first = 0; rows && first < vocabulary; first += step) {
    int64_t columns = std::min(step, vocabulary - first);
    Tensor logits = keep ? kept : chunk_buffer(rows, columns, hidden);
    product_into(logits, hidden, weight.narrow(0, first, columns).t());
    by_type(hidden, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      log_sum_exp_chunk<T>(in<T>(logits), target, out<float>(state), rows, columns, first);
    });
  }
  const float* cell = in<float>(state);
  for (int64_t i = 0; i < rows; ++i) {
    float value = cell[i * 3] + std::log(cell[i * 3 + 1]);
    out<float>(log_sum_exp)[i] = value;
    out<float>(log_prob)[i] = cell[i * 3 + 2] - value;
  }
  return {log_prob, log_sum_exp, kept};
}

Two token_log_prob_backward_cpu(const Tensor& grad_, const Tensor& hidden_, const Tensor& weight_,
                                const Tensor& targets_, const Tensor& log_sum_exp_, const Tensor& kept_) {
  check_head(hidden_, weight_, targets_);
  Tensor hidden = dense(hidden_), weight = dense(weight_), targets = dense(targets_), kept = dense(kept_);
  Tensor grad = dense(grad_), log_sum_exp = dense(log_sum_exp_);
  int64_t rows = hidden.size(0), vocabulary = weight.size(0), step = chunk_columns(rows, vocabulary);
  TORCH_CHECK(grad.scalar_type() == at::kFloat && grad.numel() == rows && log_sum_exp.numel() == rows &&
                  (kept.numel() == 0 || kept.numel() == rows * vocabulary),
              "a gradient does not fit");
  Tensor grad_weight = rows ? at::empty_like(weight) : at::zeros(weight.sizes(), weight.options());
  Tensor grad_hidden = at::empty_like(hidden), sum;
  for (int64_t first = 0; rows && first < vocabulary; first += step) {
    int64_t columns = std::min(step, vocabulary - first);
    Tensor part = weight.narrow(0, first, columns), logits = chunk_buffer(rows, columns, hidden);
    if (kept.numel())
      logits.copy_(kept.narrow(1, first, columns));
    else
      product_into(logits, hidden, part.t());
    by_type(hidden, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      softmax_gradient_chunk<T>(out<T>(logits), in<int64_t>(targets), in<float>(log_sum_exp), in<float>(grad), rows,
                                columns, first);
    });
    Tensor grad_part = grad_weight.narrow(0, first, columns);
    weight_gradient(grad_part, logits, hidden);
    product_into(grad_hidden, logits, part);
    if (step < vocabulary) sum = first ? sum.add_(grad_hidden) : grad_hidden.to(at::kFloat, false, true);
  }
  if (sum.defined()) grad_hidden.copy_(sum);
  return {grad_hidden, grad_weight};
}

// ---- choice

void register_kernels(torch::Library& library, const std::string& name) {
  if (name == "rms_norm") {
    library.impl("rms_norm", &rms_norm_cpu);
    library.impl("rms_norm_backward", &rms_norm_backward_cpu);
  } else if (name == "add_rms_norm") {
    library.impl("add_rms_norm", &add_rms_norm_cpu);
    library.impl("add_rms_norm_backward", &norm_gradients);
  } else if (name == "split_rotary") {
    library.impl("split_rotary", &split_rotary_cpu);
    library.impl("split_rotary_backward", &split_rotary_backward_cpu);
  } else if (name == "swiglu") {
    library.impl("swiglu", &swiglu_cpu);
    library.impl("swiglu_backward", &swiglu_backward_cpu);
  } else if (name == "linear") {
    library.impl("linear", &linear_cpu);
    library.impl("linear_backward", &linear_backward_cpu);
  } else if (name == "token_log_prob") {
    library.impl("token_log_prob", &token_log_prob_cpu);
    library.impl("token_log_prob_backward", &token_log_prob_backward_cpu);
  } else if (!register_attention(library, name) && !register_experts(library, name) &&
             !register_inference(library, name) && !register_optimiser(library, name)) {
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
}

}  // namespace liaoyuan

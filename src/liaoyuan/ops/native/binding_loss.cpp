// The loss head, as an operator of torch's dispatcher; see binding.cpp.
//
// Logits are computed in chunks of a fixed number of columns, so that the order of a row's sums is its own whatever
// rows are beside it; and of so many rows that a chunk stays in the caches between the product and what reads it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace liaoyuan {

namespace {

constexpr int64_t COLUMNS = 2048;  // of a chunk, two blocks of denominator.h: products by it are as fast as larger ones
constexpr int64_t ROWS = 1024;     // of a chunk at most, which has 4 MiB then in bf16

Tensor chunk_buffer(int64_t rows, int64_t columns, const Tensor& like) {
  void* data = scratch(2, size_t(rows * columns) * like.element_size());
  return at::from_blob(data, {rows, columns}, like.options().requires_grad(false));
}

// c = a b, where all have rows or columns without gaps.
template <class T>
void product(const Tensor& c, const Tensor& a, const Tensor& b) {
  bool a_turned = a.stride(1) != 1, b_turned = b.stride(1) != 1;
  MatrixShape shape{a.size(0), b.size(1), a.size(1), a_turned, b_turned, a.stride(a_turned), b.stride(b_turned),
                    c.stride(0)};
  multiply<T>({in<T>(a), in<T>(b), out<T>(c), shape});
}

struct Head {
  Tensor hidden, weight, targets;
  int64_t rows, columns, first, vocabulary;

  const int64_t* target(int64_t row) const { return in<int64_t>(targets) + row; }
};

Head head_of(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, int64_t vocabulary) {
  same_type(hidden, weight);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
              "hidden states ", hidden.sizes(), " do not fit a head ", weight.sizes());
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.device().is_cpu() && targets.dim() == 1 &&
                  targets.size(0) == hidden.size(0),
              "targets must be int64 [", hidden.size(0), "], not ", targets.scalar_type(), " ", targets.sizes());
  TORCH_CHECK(first >= 0 && first + weight.size(0) <= vocabulary, "rows ", first, " to ", first + weight.size(0),
              " are no part of a vocabulary of ", vocabulary);
  Head head{dense(hidden), dense(weight), dense(targets), hidden.size(0), weight.size(0), first, vocabulary};
  for (int64_t i = 0; i < head.rows; ++i)
    TORCH_CHECK(*head.target(i) >= 0 && *head.target(i) < vocabulary, "target ", *head.target(i),
                " is not in the vocabulary of ", vocabulary);
  return head;
}

// Call body(begin, count) for parts of `count` things of this size.
template <class Body>
void in_parts(int64_t count, int64_t size, const Body& body) {
  for (int64_t begin = 0; begin < count; begin += size) body(begin, std::min(size, count - begin));
}

// Read the logits of some rows into their states; `kept` has room for all of them, or is empty.
template <class T>
void read_rows(const Head& head, int64_t begin, int64_t rows, bool moments, const Tensor& kept, LogitState* states) {
  Tensor hidden = head.hidden.narrow(0, begin, rows);
  in_parts(head.columns, COLUMNS, [&](int64_t first, int64_t columns) {
    Tensor logits = kept.numel() ? kept.narrow(0, begin, rows).narrow(1, first, columns)
                                 : chunk_buffer(rows, columns, hidden);
    product<T>(logits, hidden, head.weight.narrow(0, first, columns).t());
    LogitChunk<const T> chunk{in<T>(logits), logits.stride(0), rows, columns, head.first + first};
    read_logits<T>(chunk, head.target(begin), states + begin, moments);
  });
}

Five loss_head_cpu(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, int64_t vocabulary,
                   bool moments, bool keep) {
  Head head = head_of(hidden, weight, targets, first, vocabulary);
  std::vector<LogitState> states(head.rows);
  Tensor kept = at::empty({keep ? head.rows : 0, head.columns}, hidden.options());
  by_type(hidden, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    in_parts(head.rows, ROWS, [&](int64_t begin, int64_t rows) {
      read_rows<T>(head, begin, rows, moments, kept, states.data());
    });
  });
  auto real = hidden.options().dtype(at::kFloat);
  auto numbers = [&](bool wanted) { return at::empty({wanted ? head.rows : 0}, real); };
  Tensor chosen = numbers(true), log_sum_exp = numbers(true), entropy = numbers(moments), mean = numbers(moments);
  for (int64_t i = 0; i < head.rows; ++i) {
    const LogitState& row = states[i];
    const Denominator& all = row.denominator;
    out<float>(chosen)[i] = row.chosen;
    out<float>(log_sum_exp)[i] = all.log();
    if (moments) out<float>(entropy)[i] = float(std::log(all.sum) - row.product / all.sum);
    if (moments) out<float>(mean)[i] = row.logits / float(vocabulary);
  }
  return {chosen, log_sum_exp, entropy, mean, kept};
}

// How the gradients of the four numbers of each row become those of its logits.
std::vector<LogitGradient> gradients_of(const OptionalTensor (&grads)[4], const Tensor& log_sum_exp,
                                        const Tensor& entropy, int64_t vocabulary) {
  int64_t rows = log_sum_exp.numel();
  for (const OptionalTensor& grad : grads)
    TORCH_CHECK(!grad || (grad->scalar_type() == at::kFloat && grad->numel() == rows), "a gradient does not fit");
  TORCH_CHECK(log_sum_exp.scalar_type() == at::kFloat && (!grads[2] || entropy.numel() == rows),
              "what was saved does not fit");
  auto of = [&](int number, int64_t row) { return grads[number] ? in<float>(grads[number])[row] : 0.0f; };
  std::vector<LogitGradient> found(rows);
  for (int64_t i = 0; i < rows; ++i) {
    float slope = -of(2, i);
    float of_sum = of(1, i) + (grads[2] ? slope * in<float>(entropy)[i] : 0.0f);
    found[i] = {in<float>(log_sum_exp)[i], of(0, i), of_sum, slope, of(3, i) / float(vocabulary)};
  }
  return found;
}

// The gradients of hidden states and weight: chunk by chunk of the vocabulary, and in it by rows.
template <class T>
void backward_into(const Head& head, const std::vector<LogitGradient>& grads, bool moments, const Tensor& kept,
                   Tensor& grad_hidden, Tensor& grad_weight) {
  auto real = head.hidden.options().dtype(at::kFloat);
  int64_t width = head.hidden.size(1), block = std::min(ROWS, head.rows), strip = std::min(COLUMNS, head.columns);
  bool one_strip = strip == head.columns, one_block = block == head.rows;
  Tensor hidden_sum = at::empty({one_strip ? 0 : head.rows, width}, real);
  Tensor weight_sum = at::empty({one_block ? 0 : strip, width}, real);
  Tensor part = at::empty({std::max(one_strip ? 0 : block, one_block ? 0 : strip), width}, head.hidden.options());
  in_parts(head.columns, strip, [&](int64_t first, int64_t columns) {
    Tensor weight = head.weight.narrow(0, first, columns), weight_out = grad_weight.narrow(0, first, columns);
    in_parts(head.rows, block, [&](int64_t begin, int64_t rows) {
      Tensor hidden = head.hidden.narrow(0, begin, rows), hidden_out = grad_hidden.narrow(0, begin, rows);
      Tensor logits = chunk_buffer(rows, columns, hidden), source = logits;
      if (kept.numel())
        source = kept.narrow(0, begin, rows).narrow(1, first, columns);
      else
        product<T>(logits, hidden, weight.t());
      LogitChunk<const T> chunk{in<T>(source), source.stride(0), rows, columns, head.first + first};
      logit_gradients<T>(chunk, out<T>(logits), head.target(begin), grads.data() + begin, moments);
      Tensor to = one_block ? weight_out : part.narrow(0, 0, columns);
      product<T>(to, logits.t(), hidden);
      if (!one_block)
        add_part<T>(in<T>(to), out<float>(weight_sum), out<T>(weight_out), to.numel(), begin == 0,
                    begin + rows == head.rows);
      to = one_strip ? hidden_out : part.narrow(0, 0, rows);
      product<T>(to, logits, weight);
      if (!one_strip)
        add_part<T>(in<T>(to), out<float>(hidden_sum) + begin * width, out<T>(hidden_out), to.numel(), first == 0,
                    first + columns == head.columns);
    });
  });
}

Two loss_head_backward_cpu(const OptionalTensor& grad_chosen, const OptionalTensor& grad_log_sum_exp,
                           const OptionalTensor& grad_entropy, const OptionalTensor& grad_mean, const Tensor& hidden,
                           const Tensor& weight, const Tensor& targets, const Tensor& log_sum_exp_,
                           const Tensor& entropy_, const Tensor& kept_, int64_t first, int64_t vocabulary) {
  Head head = head_of(hidden, weight, targets, first, vocabulary);
  Tensor log_sum_exp = dense(log_sum_exp_), entropy = dense(entropy_), kept = dense(kept_);
  TORCH_CHECK(log_sum_exp.numel() == head.rows && (kept.numel() == 0 || kept.numel() == head.rows * head.columns),
              "what was saved does not fit");
  const OptionalTensor given[4] = {dense(grad_chosen), dense(grad_log_sum_exp), dense(grad_entropy), dense(grad_mean)};
  std::vector<LogitGradient> grads = gradients_of(given, log_sum_exp, entropy, vocabulary);
  Tensor grad_hidden = at::empty_like(head.hidden);
  Tensor grad_weight = head.rows ? at::empty_like(head.weight) : at::zeros(weight.sizes(), weight.options());
  if (head.rows)
    by_type(hidden, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      backward_into<T>(head, grads, given[2] || given[3], kept, grad_hidden, grad_weight);
    });
  return {grad_hidden, grad_weight};
}

}  // namespace

bool register_loss(torch::Library& library, const std::string& name) {
  if (name != "loss_head") return false;
  library.impl("loss_head", &loss_head_cpu);
  library.impl("loss_head_backward", &loss_head_backward_cpu);
  return true;
}

}  // namespace liaoyuan

// The differentiable side of the loss head; see autograd.cpp.
#include <algorithm>

#include "autograd.h"

namespace liaoyuan {

namespace {

Five call_loss_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first,
                    int64_t vocabulary, bool moments, bool keep) {
  static auto op = find<Five(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, bool)>(
      "liaoyuan::loss_head");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(hidden, weight, targets, first, vocabulary, moments, keep);
}

struct LossHead : Function<LossHead> {
  static variable_list forward(AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                               const Tensor& targets, int64_t first, int64_t vocabulary, bool moments, bool keep) {
    auto [chosen, log_sum_exp, entropy, mean, kept] =
        call_loss_head(hidden, weight, targets, first, vocabulary, moments, keep);
    context->save_for_backward({hidden, weight, targets, log_sum_exp, entropy, kept});
    context->saved_data["first"] = first;
    context->saved_data["vocabulary"] = vocabulary;
    context->mark_non_differentiable(moments ? variable_list{kept} : variable_list{entropy, mean, kept});
    context->set_materialize_grads(false);  // or a zero gradient of all logits would be filled
    return {chosen, log_sum_exp, entropy, mean, kept};
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    static auto op =
        find<Two(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                 const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                 int64_t)>("liaoyuan::loss_head_backward");
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); }))
      return variable_list(7);
    auto saved = context->get_saved_variables();
    auto [grad_hidden, grad_weight] =
        op.call(option_of(grads[0]), option_of(grads[1]), option_of(grads[2]), option_of(grads[3]), saved[0], saved[1],
                saved[2], saved[3], saved[4], saved[5], context->saved_data["first"].toInt(),
                context->saved_data["vocabulary"].toInt());
    Tensor none;
    return {grad_hidden, grad_weight, none, none, none, none, none};
  }
};

Five loss_head_autograd(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first,
                        int64_t vocabulary, bool moments, bool keep) {
  if (!needs_graph(hidden, weight)) return call_loss_head(hidden, weight, targets, first, vocabulary, moments, false);
  auto outputs = LossHead::apply(hidden, weight, targets, first, vocabulary, moments, keep);
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]};
}

}  // namespace

void register_loss_autograd(torch::Library& library, const std::string& name) {
  if (name == "loss_head") library.impl("loss_head", &loss_head_autograd);
}

}  // namespace liaoyuan

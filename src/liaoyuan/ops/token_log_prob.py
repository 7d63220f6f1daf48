"""Log-probability of given tokens under the output head, without keeping fp32 logits.

The native kernel works through the vocabulary in chunks (as in Wijmans et al. 2024, arXiv 2411.09009). Logits in the
model's own dtype are kept for the backward pass where they are small, since computing them again costs more.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE_INEXACT, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, wide
from liaoyuan.ops.shapes import takes_shapes

KEPT_LOGITS = 2**25  # elements of logits that are kept for the backward pass: 64 MiB in bf16


@takes_shapes(hidden="float [N, H]", weight="same [V, H]", targets="int64 [N]")
def token_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(hidden @ weight^T)[target]: every loss of the project is a function of it.

    Args:
        hidden: [N, H]; weight: [V, H], same dtype; targets: int64 [N], each in 0 .. V - 1.

    Returns:
        fp32 [N]; the softmax is computed in fp32 (fp64 for hidden states in fp64).
    """
    if takes(TOKEN_LOG_PROB, hidden, weight):
        keep = hidden.shape[0] * weight.shape[0] <= KEPT_LOGITS
        return TOKEN_LOG_PROB.call(hidden, weight, targets, keep)[0]
    return _token_log_prob(hidden, weight, targets)


def _token_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = wide(hidden @ weight.t())
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    return chosen - torch.logsumexp(logits, -1)


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `token_log_prob` does, the log of the softmax's denominator, and the logits if they are kept."""
    logits = hidden.detach() @ weight.detach().t()
    kept = logits if keep else logits.new_empty(0, weight.shape[0])
    return _token_log_prob(hidden, weight, targets), wide(logits).logsumexp(-1), kept


def _backward(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = pull_back(_token_log_prob, (hidden, weight, targets), (0, 1), (grad,))
    return grad_hidden, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _apply(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *torch.ops.liaoyuan.token_log_prob_backward(grad, *ctx.saved_tensors), None, None


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    one, two = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return one, two, hidden.new_empty(rows if keep else 0, weight.shape[0])


def _fake_backward(grad: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(5)
    for rows, width, vocabulary, keep in ((3, 24, 17, False), (40, 64, 1003, True), (70, 64, 3001, False)):
        hidden = torch.randn(rows, width, generator=generator).to(dtype)
        weight = (torch.randn(vocabulary, width, generator=generator) * 0.1).to(dtype)
        yield hidden, weight, torch.randint(vocabulary, (rows,), generator=generator), keep


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    weight = (torch.randn(32768, 512) * 0.05).to(dtype)
    return torch.randn(1024, 512).to(dtype), weight, torch.randint(len(weight), (1024,)), False


TOKEN_LOG_PROB = register(
    Operator(
        name="token_log_prob",
        kernels=(NATIVE_INEXACT, triton("token_log_prob")),  # the matrix product of torch depends on the number of rows
        schema="(Tensor hidden, Tensor weight, Tensor targets, bool keep) -> (Tensor, Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=lambda hidden, weight, targets, keep: 2 * hidden.numel() * weight.shape[0],
        traffic=lambda hidden, weight, targets, keep: (hidden.numel() + weight.numel()) * hidden.element_size(),
        gradient=Gradient(
            inputs=(0, 1),
            schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, Tensor log_sum_exp, Tensor kept) "
            "-> (Tensor, Tensor)",
            reference=_backward,
            fake=_fake_backward,
            save=_save,
            apply=_apply,
            flops=lambda grad, hidden, weight, *_: 4 * hidden.numel() * weight.shape[0],
        ),
    )
)

"""The output head as a loss needs it: of each token's logits a few numbers, and never the logits themselves.

The kernels work through the vocabulary in chunks (as in Wijmans et al. 2024, arXiv 2411.09009). Logits in the model's
own dtype are kept for the backward pass where they are small, since computing them again costs more. The weight may be
a part of the vocabulary, whose other parts are elsewhere: see `cross_entropy.merge_statistics`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.log_sum_exp import RowSum, plain_log_sum_exp, row_sum
from liaoyuan.ops.operator import Gradient, Operator, Product, pull_back, register, wide

KEPT_LOGITS = 2**26  # elements of logits that are kept for the backward pass: 128 MiB in bf16


def keeps(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether these logits are small enough to be kept."""
    return hidden.shape[0] * weight.shape[0] <= KEPT_LOGITS


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, vocabulary: int, moments: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four numbers of each token's logits, hidden @ weight^T, [N] in fp32 (fp64 for hidden states in fp64).

    Args:
        hidden: [N, H]; weight: [V, H], same dtype, rows first .. first + V - 1 of the whole `vocabulary`.
        targets: int64 [N], each in 0 .. vocabulary - 1.
        moments: whether the two last results are wanted; else they are empty.

    Returns:
        The target's logit (0 if its row is not here), the log of the softmax's denominator, the entropy of the softmax
        in nats, and the sum of the logits over `vocabulary`.
    """
    return _statistics(hidden @ weight.t(), targets, first, vocabulary, moments)


def _statistics(
    logits: Tensor,
    targets: Tensor,
    first: int,
    vocabulary: int,
    moments: bool,
    log_sum_exp: RowSum = plain_log_sum_exp,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = wide(logits)
    local = targets - first
    here = (local >= 0) & (local < logits.shape[1])
    wrong = (targets < 0) | (targets >= vocabulary)  # left to `gather`, which refuses it
    chosen = logits.gather(-1, local.where(here | wrong, 0)[:, None]).squeeze(-1).where(here, 0.0)
    height = log_sum_exp(logits)
    if not moments:
        return chosen, height, logits.new_empty(0), logits.new_empty(0)
    log_probs = logits - height[:, None]
    return chosen, height, -row_sum(log_probs.exp() * log_probs), row_sum(logits) / vocabulary


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: int,
    vocabulary: int,
    moments: bool,
    keep: bool,
    product: Product = F.linear,
    log_sum_exp: RowSum = plain_log_sum_exp,
) -> tuple[Tensor, ...]:
    """Return what `reference` does, and the logits if they are kept."""
    logits = product(hidden, weight, None)
    kept = logits.detach() if keep else logits.new_empty(0, weight.shape[0])
    return *_statistics(logits, targets, first, vocabulary, moments, log_sum_exp), kept


def _backward(
    grad_chosen: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    kept: Tensor,
    first: int,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    inputs = (hidden, weight, targets, first, vocabulary, len(entropy) == len(hidden))
    grads = (grad_chosen, grad_log_sum_exp, grad_entropy, grad_mean)
    grad_hidden, grad_weight = pull_back(reference, inputs, (0, 1), grads)
    return grad_hidden, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, first, vocabulary, moments, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4 if moments else 2 :])
    ctx.save_for_backward(hidden, weight, targets, output[1], output[2], output[4])
    ctx.part = first, vocabulary


def _apply(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    backward = torch.ops.liaoyuan.loss_head_backward
    return *backward(*grads[:4], *ctx.saved_tensors, *ctx.part), *[None] * 5


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, vocabulary: int, moments: bool, keep: bool
) -> tuple[Tensor, ...]:
    rows = hidden.shape[0]
    sizes = (rows, rows, rows if moments else 0, rows if moments else 0)
    numbers = (hidden.new_empty(size, dtype=torch.float32) for size in sizes)
    return *numbers, hidden.new_empty(rows if keep else 0, weight.shape[0])


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(5)
    for rows, width, count, first, vocabulary, moments, keep in (
        (3, 24, 17, 0, 17, True, False),
        (40, 64, 1003, 0, 1003, False, True),
        (40, 64, 1003, 500, 2503, True, True),  # a part of the vocabulary
        (70, 64, 3001, 0, 3001, True, False),
        (70, 64, 3001, 0, 3001, False, False),
    ):
        hidden = torch.randn(rows, width, generator=generator).to(dtype)
        weight = (torch.randn(count, width, generator=generator) * 0.1).to(dtype)
        targets = torch.randint(vocabulary, (rows,), generator=generator)
        yield hidden, weight, targets, first, vocabulary, moments, keep


def _workload(dtype: torch.dtype) -> tuple[Any, ...]:
    weight = (torch.randn(32768, 512) * 0.05).to(dtype)
    targets = torch.randint(len(weight), (1024,))
    return torch.randn(1024, 512).to(dtype), weight, targets, 0, len(weight), False, True


def _traffic(hidden: Tensor, weight: Tensor, *_: Any) -> int:
    return (hidden.numel() + weight.numel()) * hidden.element_size()


LOSS_HEAD = register(
    Operator(
        name="loss_head",
        kernels=(NATIVE, triton("loss_head"), TILED),
        schema="(Tensor hidden, Tensor weight, Tensor targets, int first, int vocabulary, bool moments, bool keep) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        samples=_samples,
        workload=_workload,
        flops=lambda hidden, weight, *_: 2 * hidden.numel() * weight.shape[0],
        traffic=_traffic,
        gradient=Gradient(
            inputs=(0, 1),
            schema="(Tensor? grad_chosen, Tensor? grad_log_sum_exp, Tensor? grad_entropy, Tensor? grad_mean, "
            "Tensor hidden, Tensor weight, Tensor targets, Tensor log_sum_exp, Tensor entropy, Tensor kept, int first, "
            "int vocabulary) -> (Tensor, Tensor)",
            reference=_backward,
            fake=lambda *inputs: (inputs[4].new_empty(inputs[4].shape), inputs[5].new_empty(inputs[5].shape)),
            save=_save,
            apply=_apply,
            flops=lambda *inputs: 4 * inputs[4].numel() * inputs[5].shape[0],
        ),
    )
)

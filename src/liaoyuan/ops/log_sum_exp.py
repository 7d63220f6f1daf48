"""The log of the softmax's denominator of logits that are there, for log-probabilities of any token of a row.

A log-probability is `log_probability` of a token's logit and this: in the loss head, in sampling and here by the same
sums in the same order, so that the native kernels give a token the same bits wherever it is asked for.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import NATIVE, TILED, triton
from liaoyuan.ops.operator import Operator, register, wide
from liaoyuan.ops.shapes import takes_shapes

BLOCK = 1024  # columns that are summed together
RowSum = Callable[[Tensor], Tensor]  # [R, V] -> [R]


@takes_shapes(logits="float [R, V]")
def log_sum_exp(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) of each row of [R, V], fp32 [R] (fp64 for logits in fp64); no gradient flows."""
    is_taken = takes(LOG_SUM_EXP, logits) and logits.shape[1] > 0
    found: Tensor = LOG_SUM_EXP.call(logits.detach()) if is_taken else _log_sum_exp(logits.detach())
    return found


def log_probability(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    """Return scores - log_sum_exp, in its dtype; rounding must not raise it above that of certainty."""
    return (scores.to(log_sum_exp.dtype) - log_sum_exp).clamp_max(0.0)


def row_sum(x: Tensor) -> Tensor:
    """Return the sum of each row of [R, V], in blocks: PyTorch cuts a long row that is alone between threads."""
    whole = x.shape[-1] // BLOCK * BLOCK
    return x[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1).sum(-1) + x[:, whole:].sum(-1)


def plain_log_sum_exp(scores: Tensor) -> Tensor:
    """Return log(sum(exp(scores))) of each row of [R, V], in PyTorch's own way."""
    return scores.logsumexp(-1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    return plain_log_sum_exp(wide(logits))


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(14)
    for rows, vocabulary in ((1, 3), (20, 700), (3, 20001)):
        yield ((3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype),)


LOG_SUM_EXP = register(
    Operator(
        name="log_sum_exp",
        kernels=(NATIVE, triton("sampling"), TILED),
        schema="(Tensor logits) -> Tensor",
        reference=_log_sum_exp,
        fake=lambda logits: logits.new_empty(len(logits), dtype=torch.float32),
        samples=_samples,
        workload=lambda dtype: ((4 * torch.randn(16, 128_256)).to(dtype),),
        flops=lambda *_: 0,
        traffic=lambda logits: logits.nbytes,
    )
)

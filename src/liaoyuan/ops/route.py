"""The choice of a token's experts and their weights, from the router's logits.

Softmax over all experts (Shazeer et al. 2017, arXiv 1701.06538), or DeepSeek-V3's sigmoid scores with a balancing bias
that takes part in the choice alone and a choice limited to groups (arXiv 2412.19437, sec. 2.1.2; groups: arXiv
2405.04434, sec. 2.2.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops.choice import takes
from liaoyuan.ops.kernels import ASCEND, NATIVE, TILED, triton
from liaoyuan.ops.operator import Gradient, Operator, pull_back, register, wide
from liaoyuan.ops.shapes import takes_shapes

TINY = 1e-20  # keeps weights finite where all scores vanish


@takes_shapes(logits="float [N, E]", bias="float [E]")
def route(
    logits: Tensor,
    kept: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    group_best: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose the `kept` best of E experts for each token, the best first, of equals the first.

    Args:
        logits: [N, E], computed with in fp32 (fp64 for fp64).
        scoring: "softmax" over the experts, or "sigmoid" of each.
        bias: [E] or None, added to the scores for the choice, not for the weights; gets no gradient.
        groups: experts lie in so many equal groups, and only those of the best `kept_groups` can be chosen; a group
            is as good as the sum of its `group_best` best experts.
        normalise: divide the weights by their sum. scale: multiplies them at last.

    Returns:
        weights [N, kept], fp32 or fp64, and the experts they belong to, int64 [N, kept].

    Raises:
        ValueError: so many experts cannot be chosen, or the bias does not fit.
    """
    _check(logits, kept, scoring, groups, kept_groups, group_best)
    logits = wide(logits)
    bias = None if bias is None else bias.detach().to(logits.dtype)
    options = (kept, scoring, groups, kept_groups, group_best, normalise, scale)
    if takes(ROUTE, logits, bias):
        return ROUTE.call(logits, bias, *options)
    return _route(logits, bias, *options)


def _check(logits: Tensor, kept: int, scoring: str, groups: int, kept_groups: int, group_best: int) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, not {scoring}")
    experts = logits.shape[1]
    if groups < 1 or experts % groups or not 1 <= kept_groups <= groups or group_best < 1:
        raise ValueError(f"{kept_groups} of {groups} groups cannot be chosen, by their {group_best} best, of {experts}")
    if not 1 <= kept <= experts // groups * kept_groups:
        raise ValueError(f"{kept} of {experts} experts cannot be chosen from {kept_groups} of {groups} groups")


def _route(
    logits: Tensor,
    bias: Tensor | None,
    kept: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_best: int,
    normalise: bool,
    scale: float,
    sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, scoring, sigmoid)
    values = scores.detach() if bias is None else scores.detach() + bias
    if groups > 1:
        values = _within_best_groups(values.unflatten(1, (groups, -1)), kept_groups, group_best).flatten(1)
    chosen = _best(values, kept)
    return _weights(scores, chosen, normalise, scale), chosen


def _scores(logits: Tensor, scoring: str, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid) -> Tensor:
    return wide(logits).softmax(-1) if scoring == "softmax" else sigmoid(wide(logits))


def _within_best_groups(values: Tensor, kept_groups: int, group_best: int) -> Tensor:
    """[N, groups, E / groups], with -inf outside the best groups."""
    best = _best(values.topk(min(group_best, values.shape[2]), -1).values.sum(-1), kept_groups)
    kept = torch.zeros_like(values[..., 0], dtype=torch.bool).scatter(1, best, True)
    return values.masked_fill(~kept[..., None], float("-inf"))


def _best(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _weights(scores: Tensor, chosen: Tensor, normalise: bool, scale: float) -> Tensor:
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * scale


def _backward(grad: Tensor, logits: Tensor, chosen: Tensor, scoring: str, normalise: bool, scale: float) -> Tensor:
    def weights(logits: Tensor) -> Tensor:
        return _weights(_scores(logits, scoring), chosen, normalise, scale)

    return pull_back(weights, (logits,), (0,), (grad,))[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, scoring, _, _, _, normalise, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])
    ctx.options = scoring, normalise, scale


def _apply(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 8
    if grad is None:
        return None, *none
    return torch.ops.liaoyuan.route_backward(grad, *ctx.saved_tensors, *ctx.options), *none


def _fake(logits: Tensor, bias: Tensor | None, kept: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], kept)
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.long)


def _samples(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(13)
    for rows, experts, *options in (
        (5, 8, 2, "softmax", 1, 1, 1, True, 1.0),
        (40, 60, 4, "softmax", 6, 3, 1, False, 16.0),
        (33, 64, 8, "sigmoid", 8, 4, 2, True, 2.5),
    ):
        logits = 2 * torch.randn(rows, experts, generator=generator).to(dtype)
        bias = 0.1 * torch.randn(experts, generator=generator).to(dtype) if options[1] == "sigmoid" else None
        yield logits, bias, *options


ROUTE = register(
    Operator(
        name="route",
        kernels=tuple(replace(kernel, dtypes=(torch.float32,)) for kernel in (NATIVE, ASCEND, triton("route"), TILED)),
        schema="(Tensor logits, Tensor? bias, int kept, str scoring, int groups, int kept_groups, int group_best, "
        "bool normalise, float scale) -> (Tensor, Tensor)",
        reference=_route,
        fake=_fake,
        samples=_samples,
        flops=lambda *_: 0,
        workload=lambda dtype: (torch.randn(2048, 128, dtype=dtype), None, 8, "softmax", 1, 1, 1, True, 1.0),
        traffic=lambda logits, bias, kept, *_: logits.numel() * logits.element_size() + len(logits) * kept * 12,
        gradient=Gradient(
            inputs=(0,),
            schema="(Tensor grad, Tensor logits, Tensor chosen, str scoring, bool normalise, float scale) -> Tensor",
            reference=_backward,
            fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
            save=_save,
            apply=_apply,
        ),
    )
)

"""AdamW on weights that are held in bf16 alone: no fp32 masters, and rounding by chance instead.

An update far below a bf16 weight's last place is lost if it is rounded to nearest, and right on the mean if the weight
goes up or down by chance (Gupta et al. 2015, arXiv 1502.02551, sec. 3; for whole models: Zamirai et al. 2021, arXiv
2010.06192). The random numbers follow from the run's seed, the step, the weight's name and the element's place in the
whole weight: a resumed run and any sharding draw the same.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from liaoyuan.ops import adamw_step
from liaoyuan.parallel import own_block
from liaoyuan.training.weights import Weight


class StochasticAdamW:
    """The update of bf16 weights (fp32 ones are simply updated), as `AdamW` uses torch's: the same groups and state."""

    def __init__(
        self,
        weights: Sequence[Weight],
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        self.param_groups = [{"lr": 0.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.defaults = {"fused": False}
        self._weights = {weight.master: weight for weight in weights}
        self._betas, self._eps, self._seed = betas, eps, seed

    def step(self) -> None:
        """Update the weights that have gradients."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._update(self._weights[master], group)

    def _update(self, weight: Weight, group: dict[str, Any]) -> None:
        master = weight.master
        assert master.grad is not None
        if master not in self.state:
            self.state[master] = fresh_state(master)
        state = self.state[master]
        state["step"] += 1
        tensors = (master, master.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for begin, end, offset in runs(weight):
            part, slope, first, second = ([x.view(-1)[begin:end]] for x in tensors)
            adamw_step(
                *(part, slope, first, second, int(state["step"]), group["lr"]),
                betas=self._betas,
                eps=self._eps,
                weight_decay=group["weight_decay"],
                seed=self._seed << 32 | zlib.crc32(weight.name.encode()),
                offsets=[offset],
            )


def fresh_state(master: Tensor) -> dict[str, Tensor]:
    """Return the state of a weight before its first update: moments of zero, in fp32."""
    moments = {key: torch.zeros_like(master, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros(()), **moments}


def runs(weight: Weight) -> Iterator[tuple[int, int, int]]:
    """Yield the stretches of this process's part that are one stretch of the whole: begin, end, and place in the whole.

    One, unless the weight is cut along a dimension that is not its first (by tensor parallelism).
    """
    if weight.master.dtype is torch.float32:  # nothing is rounded
        yield 0, weight.master.numel(), 0
        return
    starts, shape = own_block(weight.parameter)
    whole = tuple(weight.parameter.shape)
    cut = max((i for i in range(len(whole)) if shape[i] != whole[i]), default=0)
    length = math.prod(shape[cut:])
    strides = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    for run in range(math.prod(shape[:cut])):
        place, rest = sum(start * stride for start, stride in zip(starts, strides, strict=True)), run
        for dim in reversed(range(cut)):
            rest, index = divmod(rest, shape[dim])
            place += index * strides[dim]
        yield run * length, (run + 1) * length, place

"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

Matrices of the layers go through Muon, everything else (token tables, norms, biases) through AdamW. The update is
scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so one learning rate serves both.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liaoyuan.ops import newton_schulz
from liaoyuan.parallel import Owners, World
from liaoyuan.training.optimiser import INFINITE, AdamW
from liaoyuan.training.weights import (
    Weight,
    copy_masters,
    drop_gradients,
    fitting,
    gather_and_clip,
    gather_gradients,
    load_masters,
    master_copies,
    trained_weights,
)

UPDATE_SCALE = 0.2  # root mean square of AdamW's updates; Liu et al. 2025, sec. 2.2


class Muon:
    """Muon for the layers' matrices and AdamW for the rest, with the interface of `AdamW`.

    Merged projections are orthogonalised part by part: gate and up each alone, and the joint query-key-value
    matrix whole. A sharded matrix is put together at its owner, one of the processes, and cut up again there.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        world: World | None = None,
    ) -> None:
        """`parameters` are `model.named_parameters()`; `betas` and `eps` are those of AdamW."""
        self._world = world or World()
        named = list(parameters)
        self._weights = trained_weights((n, p) for n, p in named if _is_matrix(n, p))
        self._rest = AdamW(((n, p) for n, p in named if not _is_matrix(n, p)), betas, eps, weight_decay)
        self._owners = Owners([weight.parameter for weight in self._weights])
        self._momentum = {weight.name: torch.zeros_like(weight.master) for weight in self._weights}
        self._decay, self._mass = weight_decay, momentum

    def accumulate(self) -> None:
        """See `AdamW.accumulate`."""
        gather_gradients(self._all())

    def step(self, learning_rate: float, clip: float = 1.0, limit: float = INFINITE) -> float:
        """See `AdamW.step`."""
        norm = gather_and_clip(self._all(), clip, self._world)
        if norm <= limit and norm < INFINITE:
            self._rest.update(learning_rate)
            self._update(learning_rate)
        drop_gradients(self._all())
        return norm

    def describe(self) -> dict[str, Any]:
        """See `AdamW.describe`."""
        return {**self._rest.describe(), "optimiser": "muon", "momentum": self._mass}

    def state(self) -> dict[str, Tensor]:
        """See `AdamW.state`."""
        momentum = {f"{name}.momentum": value for name, value in self._momentum.items()}
        return {**self._rest.state(), **master_copies(self._weights), **momentum}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `AdamW.load`."""
        self._rest.load(state)
        load_masters(self._weights, state)
        for weight in self._weights:
            self._momentum[weight.name].copy_(fitting(state, f"{weight.name}.momentum", weight.master.shape))

    def _all(self) -> list[Weight]:
        return [*self._weights, *self._rest.weights]

    def _update(self, learning_rate: float) -> None:
        directions = []
        for weight in self._weights:
            gradient, momentum = weight.master.grad, self._momentum[weight.name]
            gradient = torch.zeros_like(weight.master) if gradient is None else gradient
            momentum.lerp_(gradient, 1 - self._mass)
            directions.append(gradient.lerp(momentum, self._mass))  # Nesterov's look-ahead
        own = self._owners.gather(directions)
        updates = _orthogonalised([self._weights[n].name for n in own], [*own.values()])
        for weight, update in zip(
            self._weights, self._owners.scatter(dict(zip(own, updates, strict=True)), directions), strict=True
        ):
            weight.master.mul_(1 - learning_rate * self._decay)
            weight.master.sub_(update, alpha=learning_rate)
        copy_masters(self._weights)


def _orthogonalised(names: list[str], directions: list[Tensor]) -> list[Tensor]:
    """Return the scaled update of every direction; matrices of one shape go through together."""
    parts = [_split(name, direction) for name, direction in zip(names, directions, strict=True)]
    updates: list[Tensor] = [torch.empty(0)] * len(parts)
    for shape in sorted({part.shape for part in parts}):
        group = [index for index, part in enumerate(parts) if part.shape == shape]
        scale = UPDATE_SCALE * max(shape[-2:]) ** 0.5
        for index, update in zip(group, newton_schulz(torch.stack([parts[i] for i in group])), strict=True):
            updates[index] = _join(names[index], update * scale)
    return updates


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _split(name: str, whole: Tensor) -> Tensor:
    """Return the stack of matrices in `whole`: gate and up alternate in its rows."""
    return whole.unflatten(-2, (-1, 2)).transpose(-3, -2) if "gate_up_proj" in name else whole


def _join(name: str, parts: Tensor) -> Tensor:
    return parts.transpose(-3, -2).flatten(-3, -2) if "gate_up_proj" in name else parts

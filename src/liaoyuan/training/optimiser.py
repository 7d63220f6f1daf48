"""AdamW over fp32 master weights: a weight in lower precision is the rounded copy of its master.

Or without masters, where bf16 weights are rounded by chance (`stochastic.py`).

Works on whole tensors and on this process's shards (FSDP). Every tensor of the state has a name, so a checkpoint
is a plain dictionary.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World
from liaoyuan.training.stochastic import StochasticAdamW, fresh_state
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

INFINITE = float("inf")


class Optimiser(Protocol):
    """What the training loop and a checkpoint ask of `AdamW` and `Muon`."""

    def accumulate(self) -> None: ...

    def step(self, learning_rate: float, clip: float = 1.0, limit: float = INFINITE) -> float: ...

    def describe(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, alg. 2) with clipping by the global norm.

    Weight decay is decoupled and spares norms, biases and (unless `decay_tables`) the token tables. The update
    itself is torch's fused kernel where the device has one.

    Use: `loss.backward()` (for several microbatches `accumulate()` after each), then `step(learning_rate)`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_tables: bool = False,
        world: World | None = None,
        master_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """`parameters` are `model.named_parameters()`; `world` adds up the gradient norm over the shards.

        Args:
            master_dtype: bf16 updates bf16 weights in place, rounded by chance that follows from `seed`.

        Raises:
            LiaoyuanError: no weight has the dtype in which masters are to be held.
        """
        self._world = world or World()
        self.weights = trained_weights(parameters, master_dtype)
        rounded = master_dtype is not torch.float32
        if rounded and not any(weight.master.dtype is master_dtype for weight in self.weights):
            raise LiaoyuanError(
                "train.master_dtype = 'bfloat16' is for a model in bf16: set model.dtype = 'bfloat16' too."
            )
        self._settings: dict[str, Any] = {
            "betas": list(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decay_tables": decay_tables,
        }
        decayed = [w.master for w in self.weights if w.parameter.ndim > 1 and (decay_tables or not w.is_table)]
        spared = [w.master for w in self.weights if not any(w.master is master for master in decayed)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self._inner: torch.optim.AdamW | StochasticAdamW = (
            StochasticAdamW(self.weights, groups, betas, eps, seed) if rounded else _torch_adamw(groups, betas, eps)
        )
        if rounded:
            self._settings |= {"master_dtype": "bfloat16", "seed": seed}

    def accumulate(self) -> None:
        """Gather the gradients of a backward pass in fp32; needed only between microbatches."""
        gather_gradients(self.weights)

    def step(self, learning_rate: float, clip: float = 1.0, limit: float = INFINITE) -> float:
        """Update the weights and drop the gradients; return the gradient's global norm before clipping.

        A gradient whose norm is above `limit`, or not finite, is dropped and changes nothing.
        """
        norm = gather_and_clip(self.weights, clip, self._world)
        if norm <= limit and norm < INFINITE:
            self.update(learning_rate)
        drop_gradients(self.weights)
        return norm

    def update(self, learning_rate: float) -> None:
        """Apply the gradients gathered in the masters as they are, and copy the masters to the weights."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        self._inner.step()
        copy_masters(self.weights)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with."""
        return {"optimiser": "adamw", **self._settings}

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs beside the weights: masters that are copies, moments, counts.

        It is complete from the start: what has not been updated yet has moments of zero.
        """
        tensors = master_copies(self.weights)
        for weight in self.weights:
            for key, value in (self._inner.state.get(weight.master) or self._fresh(weight)).items():
                tensors[f"{weight.name}.{key}"] = value
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of `state()`. The weights themselves must have been loaded before."""
        load_masters(self.weights, state)
        for weight in self.weights:
            self._inner.state[weight.master] = {
                key: fitting(state, f"{weight.name}.{key}", fresh.shape).to(fresh.device)
                for key, fresh in self._fresh(weight).items()
            }

    def _fresh(self, weight: Weight) -> dict[str, Tensor]:
        """Return the state of a weight before its first update."""
        place = weight.master.device if self._inner.defaults["fused"] else "cpu"  # where torch keeps the count
        fresh = fresh_state(weight.master)
        return {**fresh, "step": fresh["step"].to(place)}


def _torch_adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    try:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    except RuntimeError:  # the device has no fused update
        return torch.optim.AdamW(groups, betas=betas, eps=eps)

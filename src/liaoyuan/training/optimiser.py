"""AdamW over fp32 master weights: a weight in lower precision is the rounded copy of its master.

Works on whole tensors and on this process's shards (FSDP). Every tensor of the state has a name, so a checkpoint
is a plain dictionary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World, copies, local

INFINITE = float("inf")


@dataclass(frozen=True, eq=False)
class Weight:
    """One trained tensor: the parameter, this process's part of it, and that part's fp32 master.

    `master` shares the memory of `part` if the parameter is fp32. Gradients are gathered in `master.grad`.
    """

    name: str
    parameter: nn.Parameter
    part: Tensor
    master: Tensor

    @property
    def is_copied(self) -> bool:
        return self.part.dtype != self.master.dtype

    @property
    def is_table(self) -> bool:
        """Whether this is the token embedding or the output head."""
        return self.name.endswith(("embed_tokens.weight", "lm_head.weight"))


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
    ) -> None:
        """`parameters` are `model.named_parameters()`; `world` adds up the gradient norm over the shards."""
        self._world = world or World()
        self.weights = trained_weights(parameters)
        self._settings = {"betas": list(betas), "eps": eps, "weight_decay": weight_decay, "decay_tables": decay_tables}
        decayed = [w.master for w in self.weights if w.parameter.ndim > 1 and (decay_tables or not w.is_table)]
        spared = [w.master for w in self.weights if not any(w.master is master for master in decayed)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
        self._inner = _torch_adamw([group for group in groups if group["params"]], betas, eps)

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
        moments = {key: torch.zeros_like(weight.master) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=place), **moments}


def trained_weights(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Weight]:
    """Return the trained ones of `parameters` with their fp32 masters."""
    weights = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            part = local(parameter.detach())
            master = part.detach() if part.dtype == torch.float32 else part.float()
            weights.append(Weight(name, parameter, part, master))
    return weights


def gather_gradients(weights: Iterable[Weight]) -> None:
    """Add each parameter's gradient to that of its master, in fp32, and drop it."""
    for weight in weights:
        gradient = weight.parameter.grad
        if gradient is None:
            continue
        gradient = local(gradient)
        if weight.master.grad is None:
            weight.master.grad = gradient.to(weight.master.dtype)
        else:
            weight.master.grad.add_(gradient)
        weight.parameter.grad = None


def gather_and_clip(weights: list[Weight], clip: float, world: World) -> float:
    """Gather the gradients, scale them so that their global norm is at most `clip`, return the norm before."""
    gather_gradients(weights)
    gradients = [weight.master.grad for weight in weights if weight.master.grad is not None]
    norm = float(world.sum(_square_sum(weights)).sqrt())
    if clip < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(clip / norm)
    return norm


def _square_sum(weights: list[Weight]) -> Tensor:
    """Return the sum of this process's squared gradients; what several processes hold alike counts once among them."""
    held: dict[int, list[Tensor]] = {}
    for weight in weights:
        if weight.master.grad is not None:
            held.setdefault(copies(weight.parameter), []).append(weight.master.grad)
    sums = [torch.nn.utils.get_total_norm(gradients).square() / count for count, gradients in held.items()]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def copy_masters(weights: Iterable[Weight]) -> None:
    """Round the masters into the weights of lower precision."""
    copied = [weight for weight in weights if weight.is_copied]
    if copied:
        torch._foreach_copy_([weight.part for weight in copied], [weight.master for weight in copied])


def drop_gradients(weights: Iterable[Weight]) -> None:
    for weight in weights:
        weight.master.grad = None


def master_copies(weights: Iterable[Weight]) -> dict[str, Tensor]:
    return {f"{weight.name}.master": weight.master for weight in weights if weight.is_copied}


def load_masters(weights: Iterable[Weight], state: Mapping[str, Tensor]) -> None:
    for weight in weights:
        if weight.is_copied:
            weight.master.copy_(fitting(state, f"{weight.name}.master", weight.master.shape))
    copy_masters(weights)


def fitting(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Return a copy of `state[name]`, which must have this shape."""
    if name not in state or state[name].shape != shape:
        raise LiaoyuanError(f"The checkpoint's optimiser state has no '{name}' of shape {tuple(shape)}.")
    return state[name].clone()


def _torch_adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    try:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    except RuntimeError:  # the device has no fused update
        return torch.optim.AdamW(groups, betas=betas, eps=eps)

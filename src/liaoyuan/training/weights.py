"""The trained tensors of a model, their masters, and their gradients: gathered in fp32 and clipped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World, copies, local


@dataclass(frozen=True, eq=False)
class Weight:
    """One trained tensor: the parameter, this process's part of it, and that part's master.

    `master` is fp32; it shares the memory of `part` if that is fp32 too, or is held in bf16 alone. Gradients are
    gathered in `master.grad`, fp32.
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


def trained_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], master_dtype: torch.dtype = torch.float32
) -> list[Weight]:
    """Return the trained ones of `parameters` with their masters: fp32, or themselves if they have `master_dtype`."""
    weights = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            part = local(parameter.detach())
            master = part.detach() if part.dtype in (torch.float32, master_dtype) else part.float()
            master.grad_dtype = torch.float32
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
            weight.master.grad = gradient.float()
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

"""The tensors of a training state by name: what this process holds, and as parts of the whole tensors.

Names are `model.<parameter>` and `optimiser.<parameter>.<key>`. A key's tensor has the shape of its parameter's local
part and is sharded as the parameter is, or it is a scalar that is the same everywhere. Of a model that is frozen but
for its adapters, the adapters alone are state: the rest is in the folder that it came from.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from liaoyuan.models import Decoder
from liaoyuan.parallel import Program, local

MODEL, OPTIMISER = "model.", "optimiser."
DTYPES = {  # as safetensors spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Optimiser(Protocol):
    """What a checkpoint asks of an optimiser. `state()` is complete from the start, before the first step too."""

    def describe(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


def local_tensors(model: Decoder | Program, optimiser: Optimiser) -> dict[str, Tensor]:
    """Return all that this process holds of the state, by name, without copies: weights, buffers, moments."""
    tensors = {MODEL + name: local(tensor) for name, tensor in state_tensors(model).items()}
    return tensors | {OPTIMISER + name: value for name, value in optimiser.state().items()}


def whole_tensors(model: Decoder | Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` (of `local_tensors`) with the sharded ones as DTensors, which know their place in the whole."""
    named = state_tensors(model)
    return {name: _placed(value, named[parameter_of(name)]) for name, value in tensors.items()}


def state_tensors(model: Decoder | Program) -> dict[str, Tensor]:
    """Return what is state of a model, by name: weights and persistent buffers, or its adapters alone.

    `state_dict` first cuts what FSDP has left whole after a forward pass.
    """
    tensors = dict(model.named_tensors() if isinstance(model, Program) else model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = any(not parameter.requires_grad for _, parameter in model.named_parameters())
    return {name: tensor for name, tensor in tensors.items() if name in trained} if frozen and trained else tensors


def parameter_of(name: str) -> str:
    """Return the parameter to which a tensor of the state belongs."""
    if name.startswith(MODEL):
        return name.removeprefix(MODEL)
    return name.removeprefix(OPTIMISER).rpartition(".")[0]


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

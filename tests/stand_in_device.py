"""A device that exists nowhere, for `test_device.py`: its tensors live in CPU memory behind torch's own dispatcher.

Torch sees a back end of its own kind, called `standin` as a rule, with autograd. A call that mixes its tensors with
tensors of the CPU fails, as on a real device, so code that makes a tensor on the CPU by oversight does not pass. Global
to the process: import it in a process of its own.
"""

import os

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = os.environ.get("STAND_IN_NAME", "standin")  # what torch calls it
SEEN: set[str] = set()  # operators that ran on the device
DEVICE_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
# copies between two devices
CROSSING = {"aten::copy_", "aten::_copy_from", "aten::_to_copy"}


class StandIn(torch.Tensor):
    """A tensor on the stand-in device; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "StandIn":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()  # torch has it for its own tensors alone

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator.namespace == "aten":
            return run(operator, *args, **(kwargs or {}))
        return operator.redispatch(DEVICE_KERNEL, *args, **(kwargs or {}))  # an operator of our own: its reference


def run(operator, *args, **kwargs):
    """Run any operator of the device: on the held tensors, results wrapped again."""
    name = operator._schema.name
    SEEN.add(name)
    foreign = [item for item in tensors(args) + tensors(kwargs) if not isinstance(item, StandIn) and item.dim() > 0]
    if foreign and name not in CROSSING:
        raise RuntimeError(f"{name}: tensors of the CPU and of {NAME} in one call")
    device = kwargs.get("device")
    result = operator(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    written = [args[i] for i, arg in enumerate(operator._schema.arguments[: len(args)]) if is_written(arg)]
    written += [kwargs[arg.name] for arg in operator._schema.arguments if is_written(arg) and arg.name in kwargs]
    if not operator._schema.returns:
        return None
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    if device is not None and torch.device(device).type != NAME:
        return result  # a copy to the CPU
    return tree_map(lambda item: StandIn(item) if isinstance(item, torch.Tensor) else item, result)


def is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def tensors(tree) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda item: found.append(item) if isinstance(item, torch.Tensor) else None, tree)
    return found


def unwrap(item):
    if isinstance(item, StandIn):
        return item.held
    return torch.device("cpu") if isinstance(item, torch.device) and item.type == NAME else item


_setup_privateuseone_for_python_backend(NAME)
library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")

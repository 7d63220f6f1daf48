"""Watching the operators that a model calls, one by one, forward and backward, with the module that called each.

In the forward pass the module is known from hooks; in the backward pass from autograd's sequence numbers, since a node
of the graph was made while its module ran. An operator that reads weights belongs to the module that owns them.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Phase = Literal["forward", "backward", "update"]
PREFIX = "liaoyuan."


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    operator: "linear" for one of this package, "aten.mul" for one of PyTorch's.
    module: its name in the model, "" for the model itself or what stands around it.
    phase: "update" is what follows a backward pass: the optimiser.
    """

    operator: str
    module: str
    phase: Phase
    function: Any
    inputs: tuple[Any, ...]
    named_inputs: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.phase, self.module, self.operator


Around = Callable[[Call, Callable[[], Any]], Any]  # is given a call and what computes it; returns the output


class Watch(TorchDispatchMode):
    """Hands each operator's call to `around`, in this thread, while it is in force.

        with Watch(model, around):
            model(...).sum().backward()

    What an operator of this package calls inside is part of it and not seen.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], around: Around) -> None:
        """model: or the parts of one that are here, whose modules have the names of the whole."""
        super().__init__()
        self._models, self._around = [model] if isinstance(model, nn.Module) else list(model), around
        named = [pair for one in self._models for pair in one.named_parameters()]
        self._owners = {id(weight): name.rpartition(".")[0] for name, weight in named}
        self._running: list[str] = []
        self._made: list[tuple[int, str]] = []  # from which sequence number on nodes are of which module
        self._phase: Phase = "forward"
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in (pair for one in self._models for pair in one.named_modules()):
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._left, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        operator = name_of(func)
        call = Call(operator, self._module(args), self._phase, func, args, named)
        return self._around(call, lambda: func(*args, **named))

    def _entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            if not name:
                self._phase = "forward"
                self._made.clear()
            self._running.append(name)
            self._note()

        return enter

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self._note()

    def _note(self) -> None:
        self._made.append((_sequence_number(), self._running[-1] if self._running else ""))

    def _module(self, inputs: Sequence[Any]) -> str:
        """Return the module of the call that begins now, and note in which phase it is."""
        node = torch._C._current_autograd_node()
        if node is not None:
            self._phase = "backward"
        elif self._running:
            self._phase = "forward"
        elif self._phase == "backward":
            self._phase = "update"
        if self._phase == "update":
            return ""
        around = self._running[-1] if self._running else self._maker(node)
        owner = _common([self._owners[id(x)] for x in inputs if id(x) in self._owners])
        return owner if not around or owner.startswith(f"{around}.") else around

    def _maker(self, node: Any) -> str:
        if node is None:
            return ""
        place = bisect.bisect_right(self._made, node._sequence_nr(), key=lambda entry: entry[0])
        return self._made[place - 1][1] if place else ""


@functools.cache
def name_of(function: Any) -> str:
    """Return an operator's name as `Call.operator` has it."""
    return str(function.overloadpacket if hasattr(function, "overloadpacket") else function).removeprefix(PREFIX)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an operator's inputs or output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _sequence_number() -> int:
    return int(torch._C._autograd._get_sequence_nr())


def _common(names: Sequence[str]) -> str:
    """Return the module that all of these are or are in."""
    if len(set(names)) < 2:
        return names[0] if names else ""
    paths = [name.split(".") for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

"""Adapters of a model over several processes: the first one reads them whole, and each keeps its part.

Of a projection whose outputs are cut a process has all of A and its rows of B; of one whose inputs are cut its columns
of A and all of B, so that what it adds is a part of the sum that it takes part in anyway.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from liaoyuan.checkpoint.adapters import AdapterWeights, read_adapter
from liaoyuan.inference.adapter_stacks import Shape, Stacks
from liaoyuan.models import Decoder
from liaoyuan.models.lora import Pair, projections
from liaoyuan.parallel import Program, own_block


class Others(Protocol):
    """What the first process tells the others."""

    def adapter_came(self, places: Tensor, ranks: Tensor, values: Tensor) -> None:
        """See `pack_adapter`."""
        ...

    def adapter_went(self, number: int) -> None:
        """The adapter of this number is not needed any more."""
        ...


class SharedStacks(Stacks):
    """The first process's part of all adapters. What goes wrong goes wrong here, before the others know of it.

    chosen: what the next pass announces, for `Stacks.choose`: numbers and counts; a number alone is for all rows.
    """

    def __init__(self, program: Program, others: Others) -> None:
        super().__init__(program.models[0])
        self._program, self._others = program, others
        self.chosen: tuple[Tensor | None, Tensor | None] = (None, None)
        with torch.device("meta"):
            self._whole = Decoder(program.config)

    def read(self, folder: Path) -> AdapterWeights:
        return read_adapter(folder, self._whole, self._program.device)

    def put(self, adapter: AdapterWeights) -> int:
        self.check(adapter)
        self._others.adapter_came(*pack_adapter(adapter.weights, self._program))
        return self.take(adapter.shape, own_part(adapter.weights, self._program))

    def remove(self, number: int) -> None:
        self._others.adapter_went(number)
        super().remove(number)

    def choose(self, numbers: np.ndarray, counts: np.ndarray) -> None:
        super().choose(numbers, counts)
        self.chosen = torch.from_numpy(numbers), torch.from_numpy(counts)

    def choose_one(self, number: int) -> None:
        super().choose_one(number)
        self.chosen = torch.tensor([number]), None

    def clear(self) -> None:
        super().clear()
        self.chosen = None, None


def choose_as_told(stacks: Stacks, numbers: Tensor | None, counts: Tensor | None) -> None:
    """Choose in another process what `SharedStacks.chosen` says."""
    if numbers is None:
        stacks.clear()
    elif counts is None:
        stacks.choose_one(int(numbers[0]))
    else:
        stacks.choose(numbers.numpy(), counts.numpy())


def pack_adapter(weights: Mapping[str, Pair], program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """Return a whole adapter as a message: int64 [P], which of the model's projections it changes; int64 [P], the rank
    of each; uint8, the bytes of their pairs. On the CPU.
    """
    names = sorted(projections(program.models[0]))
    places = [place for place, name in enumerate(names) if name in weights]
    pairs = [weights[names[place]] for place in places]
    values = torch.cat([half.flatten() for pair in pairs for half in pair]).cpu()
    return torch.tensor(places), torch.tensor([len(a) for a, _ in pairs]), values.view(torch.uint8)


def adapter_bytes(places: Tensor, ranks: Tensor, program: Program) -> int:
    """Return how many bytes the pairs of `pack_adapter` have."""
    sizes = [
        rank * sum(form.shape) for form, rank in zip(_forms(places, program).values(), ranks.tolist(), strict=True)
    ]
    return sum(sizes) * program.config.torch_dtype.itemsize


def unpack_adapter(places: Tensor, ranks: Tensor, values: Tensor, program: Program) -> tuple[Shape, dict[str, Pair]]:
    """Return this process's part of the adapter of a message, and its shape: see `AdapterWeights`."""
    forms, rest = _forms(places, program), values.view(program.config.torch_dtype)
    weights: dict[str, Pair] = {}
    for (name, form), rank in zip(forms.items(), ranks.tolist(), strict=True):
        out, depth = form.shape
        a, b, rest = rest.split([rank * depth, out * rank, len(rest) - rank * (depth + out)])
        weights[name] = a.view(rank, depth).to(program.device), b.view(out, rank).to(program.device)
    return tuple(zip(forms, ranks.tolist(), strict=True)), own_part(weights, program)


def own_part(weights: Mapping[str, Pair], program: Program) -> dict[str, Pair]:
    """Return this process's part of the pairs of whole projections."""
    own = {}
    for name, (a, b) in weights.items():
        (row, column), (rows, columns) = own_block(_form(name, program))
        own[name] = a[:, column : column + columns].contiguous(), b[row : row + rows].contiguous()
    return own


def _forms(places: Tensor, program: Program) -> dict[str, Tensor]:
    names = sorted(projections(program.models[0]))
    return {names[place]: _form(names[place], program) for place in places.tolist()}


def _form(name: str, program: Program) -> Tensor:
    """Return the whole weight of a projection as a DTensor, which says what this process has of it."""
    if name in program.few_bits:
        return program.few_bits[name]
    weight = program.models[0].get_submodule(name)._parameters["weight"]
    assert weight is not None
    return weight

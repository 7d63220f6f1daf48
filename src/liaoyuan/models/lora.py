"""Low-rank adapters: scale * B (A x), added to a projection's output (Hu et al. 2021, arXiv 2106.09685, sec. 4).

Adapters are trained and stored for the projections of the family's files (`q_proj`, `gate_proj`, ...), several of which
may be one projection of ours. Of such ones A is stacked and B laid out as the rows of our weight are, so that all of
them are two products. `LowRank` is one adapter for all rows, with parameters that can be trained; a `Stack` holds many
of one shape, and each row takes its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.decoder import Decoder
from liaoyuan.models.families import FAMILIES
from liaoyuan.models.layers import Linear
from liaoyuan.models.quantised import HEAD
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops import grouped_linear, linear

Projection = Linear | QuantisedLinear
Pair = tuple[Tensor, Tensor]  # A [r, K] and B [O, r]


@dataclass(frozen=True, eq=False)
class Part:
    """A projection of the family's files that is rows of one of ours: its name, and which rows, int64 [rows]."""

    name: str
    rows: Tensor


def projections(model: Decoder) -> dict[str, Projection]:
    """Return the projections that may have an adapter, by name: all of the layers but experts' and routers'; what only
    guesses has none.
    """
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, Linear | QuantisedLinear) and _is_plain(name)}


def _is_plain(name: str) -> bool:
    return name != HEAD and ".experts." not in name and not name.startswith("further.")


def parts_of(name: str, module: Projection, config: ModelConfig) -> list[Part]:
    """Return the parts of our projection `name`."""
    rows = torch.arange(module.weight.shape[0])[:, None]
    stored = FAMILIES[config.model_type].stored(f"{name}.weight", rows, config)
    return [Part(part.name.removesuffix(".weight"), part.write().flatten()) for part in stored]


def merge(parts: Sequence[Part], pairs: Mapping[str, Pair], out: int) -> Pair:
    """Return A [R, K] and B [out, R] of a projection of ours from the pairs of those of its parts that have one.

    R is the sum of the parts' ranks. Gradients flow to the pairs.
    """
    given = [part for part in parts if part.name in pairs]
    a, b = zip(*(pairs[part.name] for part in given), strict=True)
    rows = torch.cat([part.rows for part in given]).to(b[0].device)
    blocks = torch.block_diag(*b)
    return torch.cat(a), blocks.new_zeros(out, blocks.shape[1]).index_copy(0, rows, blocks)


class LowRank(nn.Module):
    """One adapter of a projection, for all rows; `projection.adapter = LowRank(...)` puts it on.

    `lora_A` and `lora_B` hold the parameters of each part, in the shapes of PEFT's files: [r, K] and [rows, r].
    """

    def __init__(self, parts: Sequence[Part], pairs: Mapping[str, Pair], scale: float, out: int) -> None:
        super().__init__()
        self.parts, self.scale, self.out = [part for part in parts if part.name in pairs], scale, out
        self.lora_A = nn.ParameterList([nn.Parameter(pairs[part.name][0]) for part in self.parts])
        self.lora_B = nn.ParameterList([nn.Parameter(pairs[part.name][1]) for part in self.parts])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        names = [part.name for part in self.parts]
        pairs = dict(zip(names, zip(self.lora_A, self.lora_B, strict=True), strict=True))
        a, b = merge(self.parts, pairs, self.out)
        return y + linear(linear(x, a), self.scale * b)


@dataclass(eq=False)
class Stack:
    """Adapters of one shape, E of them at a time.

    weights: of each projection that they change, A [E, R, K] and B [E, O, R], the scale in B.
    rows, sizes: of the pass that is computed: int64 [M], the rows that take an adapter, those of the first one first,
        and how many each has, int64 [E]; None if no row takes any. place: of the one that all rows take, or None.
    """

    weights: dict[str, Pair]
    rows: Tensor | None = None
    sizes: Tensor | None = None
    place: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())

    def grow(self, weights: Mapping[str, Pair]) -> None:
        """Append an adapter."""
        self.weights = {
            name: (torch.cat([a, weights[name][0][None]]), torch.cat([b, weights[name][1][None]]))
            for name, (a, b) in self.weights.items()
        }

    @property
    def count(self) -> int:
        return len(next(iter(self.weights.values()))[0])

    def choose(self, rows: Sequence[np.ndarray], places: Sequence[int]) -> None:
        """Say which rows of the next pass each of the adapters in these places (rising) has, int64 each."""
        self.rows = self.sizes = self.place = None
        if not places:
            return
        device = next(iter(self.weights.values()))[0].device
        sizes = np.zeros(self.count, dtype=np.int64)
        sizes[list(places)] = [len(of_one) for of_one in rows]
        self.rows, self.sizes = (torch.from_numpy(values).to(device) for values in (np.concatenate(rows), sizes))

    def change(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output y [N, O] of the projection `name` for x [N, K], with what its rows' adapters add."""
        a, b = self.weights[name]
        if self.place is not None:
            sizes = torch.zeros(self.count, dtype=torch.int64, device=x.device)
            sizes[self.place] = len(x)
            return y + grouped_linear(grouped_linear(x, a, sizes), b, sizes)
        if self.rows is None or self.sizes is None:
            return y
        low = grouped_linear(x.index_select(0, self.rows), a, self.sizes)
        return y.index_add(0, self.rows, grouped_linear(low, b, self.sizes))

    def replace(self, place: int, weights: Mapping[str, Pair]) -> None:
        """Put an adapter in the place of one that has gone."""
        for name, (a, b) in self.weights.items():
            a[place], b[place] = weights[name]


@dataclass(eq=False)
class Stacked:
    """The adapter of a projection each of whose rows may take another one, or none: its bits depend on no other row."""

    name: str
    stacks: list[Stack] = field(default_factory=list)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        for stack in self.stacks:
            y = stack.change(self.name, x, y)
        return y

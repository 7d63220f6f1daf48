"""Low-rank adapters: scale * B (A x), added to a projection's output (Hu et al. 2021, arXiv 2106.09685, sec. 4).

Adapters are trained and stored for the projections of the family's files (`q_proj`, `gate_proj`, ...), several of which
may be one projection of ours. Of such ones A is stacked and B laid out as the rows of our weight are, so that all of
them are two products. `LowRank` is one adapter for all rows, with parameters that can be trained, DoRA's magnitudes
among them (Liu et al. 2024, arXiv 2402.09353); a `Stack` holds many of one shape, and each row takes its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.decoder import Decoder
from liaoyuan.models.families import FAMILIES
from liaoyuan.models.layers import Linear
from liaoyuan.models.quantised import HEAD
from liaoyuan.models.quantised_linear import QuantisedLinear
from liaoyuan.ops import dequantise, grouped_linear, linear, wide

Projection = Linear | QuantisedLinear
Pair = tuple[Tensor, Tensor]  # A [r, K] and B [O, r]
Prepared = tuple[Tensor, Tensor, Tensor | None]  # a pair of our projection, and DoRA's gains [O]


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


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """DoRA's magnitudes of some rows of a projection of ours: which rows, int64 [n], and their new norms, [n]."""

    rows: Tensor
    norms: Tensor


def magnitudes_of(parts: Sequence[Part], norms: Mapping[str, Tensor]) -> Magnitudes | None:
    """Return the magnitudes of a projection of ours from those of its parts that have some; None: none has any."""
    given = [part for part in parts if part.name in norms]
    if not given:
        return None
    values = torch.cat([norms[part.name] for part in given])
    return Magnitudes(torch.cat([part.rows for part in given]).to(values.device), values)


def gains(changed: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Return by what each row of a changed weight [O, K] is multiplied so that it has its magnitude: fp32 or fp64 [O].

    m / ||W + scale * B A|| (Liu et al. 2024, eq. 5); the norm is taken as a constant (sec. 4.3), so gradients flow to
    the magnitudes alone.
    """
    lengths = torch.linalg.vector_norm(wide(changed.detach()), dim=1)
    factors = wide(magnitudes.norms) / lengths[magnitudes.rows]
    return torch.ones_like(lengths).index_copy(0, magnitudes.rows, factors)


def merged_weight(weight: Tensor, pair: Pair, magnitudes: Magnitudes | None = None) -> Tensor:
    """Return the whole weight that stands for a projection and its adapter, fp32 or fp64 [O, K]; the scale is in B."""
    a, b = pair
    changed = wide(weight) + wide(b) @ wide(a)
    return changed if magnitudes is None else gains(changed, magnitudes)[:, None] * changed


def whole_weight(projection: Projection) -> Tensor:
    """Return the weight [O, K] of a projection, or what its few bits stand for, fp32."""
    return dequantise(projection.weight) if isinstance(projection, QuantisedLinear) else projection.weight.detach()


class LowRank(nn.Module):
    """One adapter of a projection, for all rows; `projection.adapter = LowRank(...)` puts it on.

    `lora_A` and `lora_B` hold the parameters of each part, in the shapes of PEFT's files: [r, K] and [rows, r];
    `lora_magnitude_vector` those of DoRA, [rows]. What is computed has the dtype of x, whatever theirs is.
    """

    def __init__(
        self, parts: Sequence[Part], pairs: Mapping[str, Pair], scale: float, out: int, dropout: float = 0.0
    ) -> None:
        """dropout: share of x's elements that the adapter does not see while it is trained."""
        super().__init__()
        self.parts, self.scale, self.out = [part for part in parts if part.name in pairs], scale, out
        self.dropout = dropout
        self.is_on = True  # off, the projection is the base's own
        self._kept: Prepared | None = None
        self.lora_A = nn.ParameterList([nn.Parameter(pairs[part.name][0]) for part in self.parts])
        self.lora_B = nn.ParameterList([nn.Parameter(pairs[part.name][1]) for part in self.parts])
        self.lora_magnitude_vector = nn.ParameterList()
        self._projection: Callable[[], Projection] | None = None

    def with_magnitudes(self, projection: Projection) -> "LowRank":
        """Give each row of each part a magnitude (DoRA), to be filled with the norms of the rows of `projection`."""
        self._projection = lambda: projection  # not as a module of this one: it holds this one
        self.lora_magnitude_vector.extend(
            nn.Parameter(a.new_empty(len(part.rows))) for part, a in zip(self.parts, self.lora_A, strict=True)
        )
        return self

    def pair(self) -> Pair:
        """Return A [R, K] and B [O, R] of our projection, the scale in B."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        a, b = merge(self.parts, dict(zip(self._names, pairs, strict=True)), self.out)
        return a, self.scale * b

    def magnitudes(self) -> Magnitudes | None:
        """Return DoRA's magnitudes; None: the adapter is a plain one."""
        vectors = list(self.lora_magnitude_vector)
        return magnitudes_of(self.parts, dict(zip(self._names, vectors, strict=True))) if vectors else None

    @property
    def _names(self) -> list[str]:
        return [part.name for part in self.parts]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.is_on:
            return y
        a, b, factors = self._kept or self._prepare(x.dtype)
        seen = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = linear(linear(seen, a), b)
        return y + low if factors is None else self._scaled(y, low, factors)

    def keep(self, dtype: torch.dtype | None) -> None:
        """Compute once what passes in `dtype` need of the parameters, which must not change until that ends (None)."""
        with torch.no_grad():
            self._kept = None if dtype is None else self._prepare(dtype)

    def _prepare(self, dtype: torch.dtype) -> "Prepared":
        a, b = self.pair()
        magnitudes, factors = self.magnitudes(), None
        if magnitudes is not None:
            assert self._projection is not None
            with torch.no_grad():
                changed = merged_weight(whole_weight(self._projection()), (a, b))
            factors = gains(changed, magnitudes)
        return a.to(dtype), b.to(dtype), factors

    def _scaled(self, y: Tensor, low: Tensor, factors: Tensor) -> Tensor:
        """Return y + low with each row of the weight at its magnitude; a bias stays as it is."""
        assert self._projection is not None
        bias = self._projection().bias
        plain = y if bias is None else y - bias
        # y itself with what is to be added to it: where nothing has been learned yet, y keeps its bits.
        return (wide(y) + (factors - 1.0) * wide(plain) + factors * wide(low)).to(y.dtype)


def adapters_of(model: Decoder) -> list[LowRank]:
    """Return the adapters that a model is trained with."""
    return [module for module in model.modules() if isinstance(module, LowRank)]


@contextmanager
def without_adapters(models: Sequence[Decoder]) -> Iterator[None]:
    """Within this, models are what they are without the adapters that they are trained with, bit for bit."""
    adapters = [adapter for model in models for adapter in adapters_of(model)]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


@contextmanager
def kept_adapters(model: Decoder) -> Iterator[None]:
    """Within this, no adapter changes, and what follows from its parameters alone is computed once for all passes,
    which have no gradients; their bits are the same.
    """
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.keep(model.embed_tokens.weight.dtype)
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.keep(None)


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

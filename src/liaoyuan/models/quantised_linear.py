"""A projection whose weight has few bits, and how it is quantised."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from liaoyuan.models.layers import Adapter
from liaoyuan.ops import QuantisedWeight, quantise, quantised_linear
from liaoyuan.ops.quantised_linear import Kind

CUT_ROWS = 8192  # of a weight that are quantised at once: the work needs several fp32 copies of them


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a model are quantised; see `ops.quantise`.

    group: weights that share a scale; None: 32 for int4, a whole output for int8 and fp8.
    head: the kind of the output head, with a scale for each token; None: it stays as it is.
    """

    kind: Kind
    group: int | None = None
    symmetric: bool = True
    head: Kind | None = "int8"

    @property
    def group_size(self) -> int | None:
        """How many weights share a scale; None: a whole output."""
        return 32 if self.group is None and self.kind == "int4" else self.group

    @property
    def of_head(self) -> "Quantisation | None":
        return None if self.head is None else replace(self, kind=self.head, group=None, symmetric=True)


class QuantisedLinear(nn.Module):
    """A projection whose weight has few bits; its parts are buffers, so that it moves and is stored like any other."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, out: int, depth: int, how: Quantisation, bias: nn.Parameter | None = None) -> None:
        """A shell: `fill` gives it a weight [out, depth]."""
        super().__init__()
        self.kind, self.symmetric, self.shape, self.bias = how.kind, how.symmetric, (out, depth), bias
        self.group = how.group_size
        for name in ("data", "scales", "zeros"):
            self.register_buffer(name, None)
        self.adapter: Adapter | None = None

    def fill(self, whole: Tensor) -> None:
        """Quantise `whole` [..., depth], whose other dimensions are the outputs."""
        for name, part in self.quantised(whole).items():
            setattr(self, name, part)

    def quantised(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the parts that `fill` makes of `whole`, by name."""
        rows = whole.detach().reshape(-1, whole.shape[-1]).split(CUT_ROWS)
        parts = [quantise(cut, self.kind, self.group, self.symmetric) for cut in rows]
        names = ("data", "scales") if self.symmetric else ("data", "scales", "zeros")
        return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}

    @property
    def weight(self) -> QuantisedWeight:
        return self.rows(0, self.shape[0])

    def rows(self, first: int, count: int) -> QuantisedWeight:
        """Return the weight of so many outputs."""
        data, scales, zeros = (
            None if part is None else part[first : first + count] for part in (self.data, self.scales, self.zeros)
        )
        assert data is not None and scales is not None
        return QuantisedWeight(data, scales, zeros, self.kind, self.group, (count, self.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        y = quantised_linear(x, self.weight, self.bias)
        return y if self.adapter is None else self.adapter(x, y)

"""How much two tensors differ, in figures that a person can act on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22  # elements that are compared at once: 32 MiB in fp64


@dataclass(frozen=True)
class Difference:
    """The largest difference of two tensors.

    relative: as a share of the largest element of the first one; infinite if shapes differ or only one is finite.
    where: index of that difference; first, second: the two values there.
    """

    largest: float = 0.0
    relative: float = 0.0
    where: tuple[int, ...] = ()
    first: float = 0.0
    second: float = 0.0
    reason: str = ""  # why it is infinite, where there is no place to name

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Difference":
        """Compare in fp64, on the CPU, a piece at a time. NaN in the same place of both is no difference."""
        if first.shape != second.shape:
            told = f"shapes {list(first.shape)} and {list(second.shape)}"
            return cls(math.inf, math.inf, reason=told)
        a, b = first.detach().reshape(-1), second.detach().reshape(-1)
        largest, place, scale = 0.0, -1, 0.0
        for start in range(0, a.numel(), CHUNK):
            x, y = (_wide(part[start : start + CHUNK]) for part in (a, b))
            gap = (x - y).abs()
            gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, gap.nan_to_num(nan=math.inf, posinf=math.inf))
            found, index = gap.max(0)
            scale = max(scale, float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
            if float(found) > largest or place < 0:
                largest, place = float(found), start + int(index)
        if largest == 0.0:
            return cls()
        where = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), first.shape))
        return cls(largest, largest / max(scale, 1e-300), where, float(a[place]), float(b[place]))

    def text(self) -> str:
        """Return the figures as a sentence's end."""
        if self.reason:
            return self.reason
        at = ", ".join(map(str, self.where))
        return f"{self.first:.6g} and {self.second:.6g} at [{at}], {self.relative:.1e} of the largest element"


NONE = Difference()


def _wide(part: Tensor) -> Tensor:
    return part.to("cpu").to(torch.float64)

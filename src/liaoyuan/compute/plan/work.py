"""What a program asks of a card and of the network, whoever wrote it: the terms in which all time is told.

Work comes from a dry run of the program that trains here (`work_of`), or, for programs of others, from formulas. Either
way it is priced by the same figures (`cost.py`, `fabric.py`).
"""

from dataclasses import dataclass
from typing import Literal

from liaoyuan.compute.plan.trace import Event

Kind = Literal["product", "attention", "stream"]
ATTENTION = ("attention", "block_attention", "_scaled_dot_product")


@dataclass(frozen=True)
class Work:
    """One call of an operator on one card.

    kind: what bounds it: matrix products, attention, or else bytes moved. dtype: of its floats, by torch's name.
    flops: of matrix products, as executed. traffic: bytes read and written. m, n, k: of each of `batch` equal products
    ([m, k] x [k, n]), 0 if it has none. backward: whether it is part of the backward pass (its products are two).
    """

    kind: Kind
    dtype: str
    flops: float = 0.0
    traffic: float = 0.0
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    backward: bool = False


def product(m: int, n: int, k: int, dtype: str = "bfloat16", batch: int = 1, size: int = 2) -> Work:
    """Return `batch` products [m, k] x [k, n], of elements of `size` bytes."""
    traffic = batch * size * (m * k + k * n + m * n)
    return Work("product", dtype, 2.0 * batch * m * n * k, float(traffic), m, n, k, batch)


def stream(traffic: float, dtype: str = "bfloat16") -> Work:
    """Return element-wise work that reads and writes so many bytes."""
    return Work("stream", dtype, traffic=traffic)


def work_of(event: Event) -> Work:
    """Return what a call of a dry run asks of a card."""
    dtype, backward = str(event.dtype).removeprefix("torch."), event.phase == "backward"
    name = event.operator.removeprefix("aten.")
    if not event.flops:
        return Work("stream", dtype, traffic=event.traffic, backward=backward)
    if name.startswith(ATTENTION):
        return Work("attention", dtype, event.flops, event.traffic, backward=backward)
    m, n, k, batch = _product(event)
    return Work("product", dtype, event.flops, event.traffic, m, n, k, batch, backward)


def _product(event: Event) -> tuple[int, int, int, int]:
    """Return (m, n, k, batch) of an event's products, from its tensors: the two largest are what goes in."""
    wide = sorted((shape for shape in event.shapes if len(shape) >= 2), key=_size, reverse=True)
    if len(wide) < 2:
        return 0, 0, 0, 1
    first, second = sorted(wide[:2], key=len)
    batch = second[0] if len(second) == 3 else 1
    shared = next((size for size in first[-2:] if size in second[-2:]), first[-1])
    others = [next((size for size in shape[-2:] if size != shared), shared) for shape in (first, second)]
    return others[0], others[1], shared, batch


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

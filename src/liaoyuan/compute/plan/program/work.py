"""What a program asks of a card and of the network, whoever wrote it: the terms in which all time is told.

Work comes from a dry run of the program that trains here (`work_of`), or, for programs of others, from formulas. Either
way it is priced by the same figures (`cost.py`, `fabric.py`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from liaoyuan.compute.plan.program.trace import Event

Kind = Literal["product", "attention", "stream"]
Shape = tuple[int, ...]
NETWORK = ("c10d.", "_c10d_functional.")  # is priced by the fabric
SDPA = "_scaled_dot_product"
ATEN = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the factors stand among an operator's tensors


@dataclass(frozen=True)
class Work:
    """One call of an operator on one card.

    kind: what bounds it: matrix products, attention, or else bytes moved. dtype: of its floats, by torch's name.
    flops: of matrix products, as executed. traffic: bytes read and written.
    m, n, k: of each of `batch` equal products ([m, k] x [k, n]), 0 if it has none. Of attention: queries, keys that a
    query sees on average, and the size of a head; `batch` heads.
    backward: whether it is an operator's backward side, whose products are the two gradients, [m, n] x [n, k] and
    [n, m] x [m, k]. anew: whether the forward product is computed there once more.
    operator: its name in a dry run, by which what was measured of it is found.
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
    anew: bool = False
    operator: str = ""

    @property
    def products(self) -> tuple[tuple[int, int, int], ...]:
        """Return (rows, columns, depth) of each of the products that are computed `batch` times."""
        forward, gradients = (self.m, self.n, self.k), ((self.m, self.k, self.n), (self.n, self.k, self.m))
        if self.kind != "product" or not self.m:
            return ()
        return (*gradients, *([forward] if self.anew else [])) if self.backward else (forward,)


def product(m: int, n: int, k: int, dtype: str = "bfloat16", batch: int = 1, size: int = 2) -> Work:
    """Return `batch` products [m, k] x [k, n], of elements of `size` bytes."""
    traffic = batch * size * (m * k + k * n + m * n)
    return Work("product", dtype, 2.0 * batch * m * n * k, float(traffic), m, n, k, batch)


def stream(traffic: float, dtype: str = "bfloat16") -> Work:
    """Return element-wise work that reads and writes so many bytes."""
    return Work("stream", dtype, traffic=traffic)


def work_of(event: Event) -> Work:
    """Return what a call of a dry run asks of a card; nothing, if it is the network's or but another view."""
    dtype, name = str(event.dtype).removeprefix("torch."), event.operator.removeprefix("aten.")
    if event.operator.startswith(NETWORK) or name == "_unsafe_view":
        return Work("stream", dtype, operator=name)
    if not event.flops:
        return Work("stream", dtype, traffic=_moved(event, name), operator=name)
    backward = name.endswith("_backward")
    if "attention" in name:
        queries, keys, heads, size = _attention(event, name)
        work = Work("attention", dtype, event.flops, event.traffic, queries, keys, size, heads, backward)
        return replace(work, operator=name)
    m, n, k, batch, anew = _product(event, name)
    two = backward and name != "quantised_linear_backward"  # its weight gets no gradient
    flops = event.flops * (1.5 if anew else 1.0)
    return Work("product", dtype, flops, event.traffic, m, n, k, batch, two, anew, name)


def _product(event: Event, name: str) -> tuple[int, int, int, int, bool]:
    """Return m, n, k and batch of an event's products, and whether its backward side computes the forward one anew.

    Shapes are those of the operator's tensors in order. Groups that differ in their rows count as equal ones.
    """
    shapes = event.shapes
    wide = [shape for shape in shapes if len(shape) >= 2]
    if name == "linear":
        return wide[0][0], wide[1][0], wide[0][1], 1, False
    if name == "linear_backward":  # grad, x, weight
        return wide[1][0], wide[2][0], wide[1][1], 1, False
    if name == "grouped_linear":
        (rows, depth), (experts, out, _) = wide[:2]
        return math.ceil(rows / experts), out, depth, experts, False
    if name == "grouped_linear_backward":
        rows, (experts, out, depth) = wide[1][0], wide[2]
        return math.ceil(rows / experts), out, depth, experts, False
    if name.startswith("loss_head"):  # hidden, weight; of the backward side the logits that were kept, if any
        (rows, depth), (vocabulary, _), kept = wide[:3]
        return rows, vocabulary, depth, 1, name.endswith("_backward") and kept[0] < rows
    if name.startswith("quantised_linear"):
        rows, out = wide[0][0], wide[1][0]
        return rows, out, event.flops // (2 * rows * out), 1, False
    if name in ATEN:
        first, second = shapes[ATEN[name] : ATEN[name] + 2]
        return first[-2], second[-1], first[-1], math.prod(first[:-2]), False
    return _unknown(wide)


def _unknown(wide: list[Shape]) -> tuple[int, int, int, int, bool]:
    """Return the same of an operator that is not known: the two largest tensors are what is multiplied."""
    largest = sorted(sorted(wide, key=math.prod)[-2:], key=len)
    if len(largest) < 2:
        return 0, 0, 0, 1, False
    first, second = largest
    batch = second[0] if len(second) == 3 else 1
    shared = next((size for size in first[-2:] if size in second[-2:]), first[-1])
    others = [next((size for size in shape[-2:] if size != shared), shared) for shape in largest]
    return others[0], others[1], shared, batch, False


def _attention(event: Event, name: str) -> tuple[int, int, int, int]:
    """Return queries, keys that each sees on average, heads, and the mean size of a head of keys and values."""
    wide = [shape for shape in event.shapes if len(shape) >= 3]
    backward = name.endswith("_backward")
    query, _, value = wide[1:4] if backward else wide[:3]
    if name.startswith(SDPA):  # [B, H, N, D]
        queries, heads = math.prod(query[:-3]) * query[-2], query[-3]
    else:
        queries, heads = query[0], query[1]
    sizes = 3 * query[-1] + 2 * value[-1] if backward else query[-1] + value[-1]
    keys = event.flops / max(2 * queries * heads * sizes, 1)
    return queries, max(round(keys), 1), heads, (query[-1] + value[-1]) // 2


def _moved(event: Event, name: str) -> float:
    """Return the bytes that an event without products reads and writes.

    What `ops.cost` counts is each tensor once. A tensor that is changed in place is read and written; of a table a
    lookup touches the rows that it takes; and of a buffer that a copy fills in part, that part.
    """
    shapes, traffic = event.shapes, float(event.traffic)
    size = event.dtype.itemsize
    if name == "_fused_adamw_":  # of weight, gradient and two moments three are written too
        return traffic * 7 / 4
    if name == "embedding":
        return 2.0 * size * math.prod(shapes[2]) + 8 * math.prod(shapes[1])
    if name == "embedding_dense_backward":  # the table's gradient is zeroed, then its rows are added to
        return traffic + 2.0 * size * math.prod(shapes[0])
    if name == "fsdp.all_gather_copy_in":  # the parts, the buffer for all, the part of it that is filled
        parts = sum(math.prod(shape) for shape in shapes[:-3])
        return 2.0 * size * parts
    if name.startswith("_foreach_") and name.endswith("_") and "copy" not in name:
        return traffic * 2
    if name.endswith("_") and name not in ("copy_", "fill_", "zero_"):
        return traffic + size * math.prod(shapes[0])
    return traffic

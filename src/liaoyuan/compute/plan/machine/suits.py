"""Which sizes of a model suit a card: how much of its products' rate those of a layer reach, and what takes the rest.

A size that leaves tiles part empty, or a last wave of them ragged, is paid for in every layer and step; a matrix with
few rows is bound by the reading of its weights.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from liaoyuan.compute.plan.machine.cost import moved, rate_of, seconds
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.work import Work, product

What = Literal["hidden_size", "head_dim", "intermediate_size", "expert"]
HEADS = (64, 80, 96, 112, 128, 160, 192, 256)
STEP = 64  # between candidates of a size
AROUND = 0.125  # how far candidates lie from the size asked for
GATED = 8 / 3  # width of a gated network, of the hidden size, that has the weights of a plain one four times as wide
WIDTHS = (512, 768, 1024, 1408, 1536, 2048, 3072, 4096)
ROWS = (16, 64, 256, 1024, 4096)  # tokens that come to one expert of a card


@dataclass(frozen=True)
class Suit:
    """How well a size suits a card.

    what, value: the size. rows: tokens of a product; of experts, those of each one. efficiency: the share of the rate
    of large products that a layer's products (of "head_dim": its attention) reach, forward and backward.
    lost: of the time, the share that each cause takes: "shape" (tiles, waves, shallow products), "memory", "calls".
    """

    what: What
    value: int
    rows: int
    efficiency: float
    lost: dict[str, float]


def suits(
    profile: DeviceProfile,
    hidden: int,
    tokens: int = 8192,
    length: int = 4096,
    tp: int = 1,
    dtype: str = "bfloat16",
    experts: int = 8,
) -> list[Suit]:
    """Return candidates for the sizes of a model around a hidden size, each kind from the best to the worst.

    Args:
        profile: of the card; its medians count.
        hidden: the hidden size that is thought of. Candidates lie within an eighth of it.
        tokens: of a microbatch on a card. length: of a document.
        tp: tensor parallel processes, each of which has its part of every width.
        experts: that one card holds, for the shapes of experts.
    """
    sure = profile.median()

    def suit(what: What, value: int, rows: int, works: Iterable[Work]) -> Suit:
        return _suit(what, value, rows, [_in(dtype, work) for work in works], sure)

    near = [value for value in _around(hidden) if value % tp == 0]
    wide = [value for value in _around(round(hidden * GATED / STEP) * STEP) if value % tp == 0]
    found = (
        [suit("hidden_size", value, tokens, _layer(value, tokens, tp)) for value in near],
        [suit("intermediate_size", value, tokens, _gated(hidden, value, tokens, tp)) for value in wide],
        [
            suit("head_dim", value, tokens, _attention(value, max(hidden // tp // value, 1), tokens, length))
            for value in HEADS
        ],
        [
            suit("expert", width, rows, _gated(hidden, width, rows, 1, experts))
            for width, rows in itertools.product(WIDTHS, ROWS)
        ],
    )
    return [one for kind in found for one in sorted(kind, key=lambda one: -one.efficiency)]


def _in(dtype: str, work: Work) -> Work:
    """Return work of bf16 in another dtype."""
    return replace(work, dtype=dtype, traffic=work.traffic * (2 if dtype == "float32" else 1))


def _around(size: int) -> Sequence[int]:
    low, high = round(size * (1 - AROUND) / STEP), round(size * (1 + AROUND) / STEP)
    return sorted({size, *(number * STEP for number in range(max(low, 1), high + 1))})


def _both(m: int, n: int, k: int, batch: int = 1) -> list[Work]:
    forward = product(m, n, k, batch=batch)
    return [forward, replace(forward, flops=2 * forward.flops, traffic=2 * forward.traffic, backward=True)]


def _layer(hidden: int, tokens: int, tp: int) -> list[Work]:
    own, wide = hidden // tp, round(hidden * GATED / STEP) * STEP
    return [*_both(tokens, 3 * own, hidden), *_both(tokens, hidden, own), *_gated(hidden, wide, tokens, tp)]


def _gated(hidden: int, wide: int, rows: int, tp: int, batch: int = 1) -> list[Work]:
    own = wide // tp
    return [*_both(rows, 2 * own, hidden, batch), *_both(rows, hidden, own, batch)]


def _attention(head: int, heads: int, tokens: int, length: int) -> list[Work]:
    keys = max(length // 2, 1)
    pairs = 2.0 * tokens * keys * heads * head
    traffic = 2.0 * 4 * tokens * heads * head
    forward = Work("attention", "bfloat16", 2 * pairs, traffic, tokens, keys, head, heads)
    return [forward, replace(forward, flops=5 * pairs, traffic=2 * traffic, backward=True)]


def _suit(what: What, value: int, rows: int, works: Iterable[Work], profile: DeviceProfile) -> Suit:
    whole = full = memory = 0.0
    count = 0
    for work in works:
        rate = rate_of(work.dtype, profile)
        least = work.flops / (rate.peak_tflops * 1e12 * rate.share.median)
        took = seconds(work, profile)
        whole, full, count = whole + took, full + least, count + 1
        memory += max(moved(work.traffic, profile) - least, 0.0)
    calls = count * profile.call.median
    lost = {"memory": memory / whole, "calls": calls / whole}
    lost["shape"] = max(1 - full / whole - sum(lost.values()), 0.0)
    return Suit(what, value, rows, min(full / whole, 1.0), lost)

"""How long a card takes for work, by the figures of its profile.

A call costs what any call does, and then its FLOPs at the rate that its shape allows or its bytes at the rate of the
memory, whichever is more; near the ridge both tell (the roofline: Williams et al. 2009, "Roofline: an insightful visual
performance model").

A product is cut in tiles, which the card's units compute side by side: the last wave of them may be ragged, small tiles
are fed too slowly, and each has a beginning and an end whatever its depth. Libraries choose the tile, and may cut the
depth too where tiles are few; here the best of these choices is taken, as theirs is among the best as a rule.
"""

import math
from functools import lru_cache

from liaoyuan.compute.plan.machine.profile import DeviceProfile, OperatorRate, ProductRate
from liaoyuan.compute.plan.program.work import Work

STAND_IN = {"float16": "bfloat16", "bfloat16": "float16", "float64": "float32"}  # whose rate serves, if one is unknown
SHARPNESS = 4.0  # of the roofline's ridge: where both are equal, a call takes 2^(1/4) = 1.19 of either
CUTS = (1, 2, 4, 8)  # parts that the depth of a product may be cut in
CUT = 8.0  # half_k's that each of them costs more: its sums are written and read again in fp32
WHOLE_HEAD = 128  # at which the shares of attention are told
NONE = (0.0, 0.0, 0.0)
Unit = tuple[tuple[int, int, int], tuple[int, int], int, float]  # tile, least, units and half_tile of a rate


def seconds(work: Work, profile: DeviceProfile) -> float:
    """Return the seconds of work on a card whose figures are certain (`profile.median()`, or a draw).

    Work that neither multiplies nor moves costs nothing: no kernel runs for it.
    """
    if not work.flops and not work.traffic:
        return 0.0
    own = profile.operators.get(f"{work.operator}.{work.dtype}")
    calling = profile.call.median * (own.calls if own else 1.0)
    if work.kind == "stream":
        return calling + (_moved(work.traffic, profile, own.share, own.near) if own else moved(work.traffic, profile))
    return calling + _either(_computing(work, profile, own), moved(work.traffic, profile))


def peak_flops(dtype: str, profile: DeviceProfile) -> float:
    """Return the FLOP/s of a card's products at the peak of a dtype."""
    return rate_of(dtype, profile).peak_tflops * 1e12


def moved(traffic: float, profile: DeviceProfile) -> float:
    """Return the seconds in which so many bytes are read and written, of which the first may lie in the cache."""
    return _moved(traffic, profile, 1.0, profile.cached_speed)


def _moved(traffic: float, profile: DeviceProfile, share: float, near: float) -> float:
    inside = min(traffic, profile.cached_bytes)
    return (inside / near + traffic - inside) / (profile.memory.median * share)


def _either(computing: float, moving: float) -> float:
    most = max(computing, moving)
    if not most:
        return 0.0
    return most * ((computing / most) ** SHARPNESS + (moving / most) ** SHARPNESS) ** (1 / SHARPNESS)


def _computing(work: Work, profile: DeviceProfile, own: OperatorRate | None) -> float:
    rate = rate_of(work.dtype, profile)
    peak = rate.peak_tflops * 1e12 * rate.share.median * (own.share if own else 1.0)
    if work.kind == "attention":
        usual = (profile.attention_backward if work.backward else profile.attention_forward).median
        return work.flops / (peak * (1.0 if own else usual) * _attended(work, profile, own))
    if not work.products:
        return work.flops / peak
    each, half = work.flops / len(work.products), own.half if own else NONE
    return sum(each / (peak * _efficiency(*shape, work.batch, rate, half)) for shape in work.products)


def _efficiency(
    rows: int, columns: int, depth: int, batch: int, rate: ProductRate, half: tuple[float, float, float]
) -> float:
    half = half if half[2] else (*half[:2], rate.half_k)
    unit = (rate.tile, rate.least, rate.units, rate.half_tile)
    return rows * columns * depth * batch / _spent(rows, columns, depth, batch, unit, half)


def _attended(work: Work, profile: DeviceProfile, own: OperatorRate | None) -> float:
    """Return the share of the rate of attention with many keys and heads of 128 that one of this shape reaches."""
    if not work.k:
        return 1.0
    keys, head = own.half[1:] if own else (profile.half_keys, profile.half_head)
    return work.n / (work.n + keys) * (1 + head / WHOLE_HEAD) / (1 + head / work.k)


def efficiency(work: Work, rate: ProductRate) -> float:
    """Return the share of the rate of large products that one of this shape reaches, above 0 and at most 1."""
    shapes = work.products
    if not shapes:
        return 1.0
    return len(shapes) / sum(1 / _efficiency(*shape, work.batch, rate, NONE) for shape in shapes)


@lru_cache(maxsize=65536)
def _spent(rows: int, columns: int, depth: int, batch: int, unit: Unit, half: tuple[float, float, float]) -> float:
    """Return for how many multiplications at the full rate the time of a product would do."""
    tile, least, units, half_tile = unit
    more_rows, more_columns, more = half
    if units == 1:  # one after the other: no waves, and the tile is the smallest that holds all
        height = max(min(tile[0], _next_power(rows)), least[0])
        width = max(min(tile[1], _next_power(columns)), least[1])
        sides = (_filled(rows, height) + more_rows) * (_filled(columns, width) + more_columns)
        return batch * sides * (_filled(depth, tile[2]) + more)
    best = math.inf
    for height, width in _tiles(tile, least):
        tiles = math.ceil(rows / height) * math.ceil(columns / width) * batch
        fed = 1 + half_tile * (1 / height + 1 / width)
        for parts in CUTS:
            waves = math.ceil(tiles * parts / units)
            inside = _filled(math.ceil(depth / parts), tile[2]) + more * (1 + CUT * (parts > 1))
            best = min(best, waves * units * height * width * inside * fed)
    return best / (1 + half_tile * (1 / tile[0] + 1 / tile[1]))


@lru_cache(maxsize=64)
def _tiles(tile: tuple[int, int, int], least: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the sizes of tiles that may be chosen: halves of the largest, either way round."""
    found = set[tuple[int, int]]()
    for high, wide in (tile[:2], tile[1::-1]):
        heights = [high >> n for n in range(8) if high >> n >= least[0]]
        widths = [wide >> n for n in range(8) if wide >> n >= least[1]]
        found |= {(height, width) for height in heights for width in widths}
    return tuple(sorted(found))


def _filled(size: int, step: int) -> int:
    return math.ceil(size / step) * step


def _next_power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def rate_of(dtype: str, profile: DeviceProfile) -> ProductRate:
    """Return the rate of products in a dtype, or in the one that stands in for it."""
    known = profile.products
    found = known.get(dtype) or known.get(STAND_IN.get(dtype, ""))
    return found or next(iter(known.values()))

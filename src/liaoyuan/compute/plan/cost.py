"""How long a card takes for work, by the figures of its profile.

A product costs the larger of its FLOPs at the rate that its shape allows and its bytes at the rate of the memory
(the roofline: Williams et al. 2009, "Roofline: an insightful visual performance model"), and what any call costs.
"""

import math

from liaoyuan.compute.plan.profile import DeviceProfile, ProductRate
from liaoyuan.compute.plan.work import Work

STAND_IN = {"float16": "bfloat16", "bfloat16": "float16", "float64": "float32"}  # whose rate serves, if one is unknown


def seconds(work: Work, profile: DeviceProfile) -> float:
    """Return the seconds of work on a card whose figures are certain (`profile.median()`, or a draw)."""
    moving = work.traffic / profile.memory.median
    return profile.call.median + max(moving, _computing(work, profile))


def _computing(work: Work, profile: DeviceProfile) -> float:
    if not work.flops:
        return 0.0
    rate = rate_of(work.dtype, profile)
    peak = rate.peak_tflops * 1e12 * rate.share.median
    if work.kind == "attention":
        share = profile.attention_backward if work.backward else profile.attention_forward
        return work.flops / (peak * share.median)
    return work.flops / (peak * efficiency(work, rate))


def efficiency(work: Work, rate: ProductRate) -> float:
    """Return the share of the rate of large products that one of this shape reaches, above 0 and at most 1."""
    if not work.m:
        return 1.0
    full = math.prod(
        size / (math.ceil(size / tile) * tile) for size, tile in zip((work.m, work.n, work.k), rate.tile, strict=True)
    )
    return full * work.k / (work.k + rate.half_k)


def rate_of(dtype: str, profile: DeviceProfile) -> ProductRate:
    """Return the rate of products in a dtype, or in the one that stands in for it."""
    known = profile.products
    found = known.get(dtype) or known.get(STAND_IN.get(dtype, ""))
    return found or next(iter(known.values()))

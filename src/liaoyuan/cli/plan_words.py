"""How plans are told: sizes, intervals and what makes these wide; and how intervals are read from options."""

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from liaoyuan.errors import LiaoyuanError

if TYPE_CHECKING:
    from liaoyuan.compute.plan.span import Span

WIDE = 0.01  # share of the uncertainty from which on a figure is told
CAUSES = 6  # figures that are told


def size(count: float) -> str:
    """Return bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def short(value: float) -> str:
    """Return a number in three digits, or whole; of what never ends, that."""
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def told(span: "Span", unit: str = "") -> str:
    """Return a quantity with the range that holds 90% of what it may be."""
    return f"{short(span.median)}{unit} ({short(span.low)} to {short(span.high)})"


def causes(width: Mapping[str, float]) -> str:
    """Return which figures an interval is as wide for, and the share of it that comes from each."""
    known = [f"{share:.0%} {name}" for name, share in width.items() if share >= WIDE][:CAUSES]
    return f"It is as wide because of {', '.join(known)}" if known else "Every figure that it rests on is certain"


def finite(value: Any) -> Any:
    """Return the value with None in place of what is infinite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_span(text: str, option: str, most: float = sys.float_info.max) -> "Span":
    """Return the span that '10' or '9,10,12' names, of values above 0 and up to `most`.

    Raises:
        LiaoyuanError: it is no such thing.
    """
    from liaoyuan.compute.plan.span import Span

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or not 0 < numbers[0] <= numbers[1] <= numbers[2] <= most:
        kind, three = ("share such as 0.9", "0.8,0.9,0.97") if most == 1 else ("number above 0", "9,10,12")
        raise LiaoyuanError(f"{option} {text}: write a {kind}, or three that rise, as {three}.")
    return Span(*numbers)

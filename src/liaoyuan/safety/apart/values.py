"""Values as JSON: what can be sent as it is, and how. Anything else stays where it is, and a number stands for it.

Never unpickled, never evaluated: the other side is a stranger, and this is all that it can make in our process.
"""

import builtins
import collections
import datetime
import fractions
import functools
import types
from collections.abc import Callable
from decimal import Decimal
from typing import Any

LARGEST_INT = 1 << 53  # beyond it ints go as hexadecimal digits: no limit of digits, no quadratic time
TYPES = {
    kind.__name__: kind
    for kind in (int, float, complex, bool, str, bytes, bytearray, list, tuple, set, frozenset, dict, range, object)
} | {"NoneType": types.NoneType, "date": datetime.date, "datetime": datetime.datetime, "Fraction": fractions.Fraction}
ERRORS = {  # of the built-in ones, those that say that something went wrong
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
}
SINGLE = {"...": ..., "NotImplemented": NotImplemented}
DATES = {
    "date": (datetime.date, ("year", "month", "day")),
    "time": (datetime.time, ("hour", "minute", "second", "microsecond")),
    "datetime": (datetime.datetime, ("year", "month", "day", "hour", "minute", "second", "microsecond")),
    "timedelta": (datetime.timedelta, ("days", "seconds", "microseconds")),
}
MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": lambda pairs: collections.Counter(dict(pairs)),
    "defaultdict": lambda pairs: collections.defaultdict(None, pairs),
}
SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
PLAIN: tuple[Any, ...] = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)


def encode(value: Any, stay: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a value as JSON; `stay` gives the stand-in of what cannot be sent. Only exact types are plain."""
    kind = type(value)
    name = kind.__name__
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -LARGEST_INT <= value <= LARGEST_INT else {"int": hex(value)}
    if kind is list:
        return [encode(item, stay) for item in value]
    if kind in (tuple, set, frozenset, collections.deque):
        return {name: [encode(item, stay) for item in value]}
    if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
        return {name: [[encode(key, stay), encode(item, stay)] for key, item in value.items()]}
    return encode_rare(value, name) or stay(value)


def encode_rare(value: Any, name: str) -> dict[str, Any] | None:
    kind = type(value)
    if kind in (bytes, bytearray):
        return {name: value.hex()}
    if kind is complex:
        return {name: [value.real, value.imag]}
    if kind is range:
        return {name: [encode(part, dict) for part in (value.start, value.stop, value.step)]}
    if kind is Decimal:
        return {name: str(value)}
    if kind is fractions.Fraction:
        return {name: [hex(value.numerator), hex(value.denominator)]}
    if name in DATES and kind is DATES[name][0] and getattr(value, "tzinfo", None) is None:
        return {name: [getattr(value, part) for part in DATES[name][1]]}
    if kind is type:
        word: str = value.__name__
        return {"type": word} if TYPES.get(word) is value else {"error": word} if ERRORS.get(word) is value else None
    for single, known in SINGLE.items():
        if value is known:
            return {"single": single}
    return None


def decode(data: Any, stands_for: Callable[[str, Any], Any]) -> Any:
    """Return the value of JSON from the other side; `stands_for` gives what a stand-in stands for.

    Raises ValueError for anything that `encode` would not have written.
    """
    if isinstance(data, list):
        return [decode(item, stands_for) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("no value has several kinds")
    ((name, body),) = data.items()
    if name in SEQUENCES:
        return SEQUENCES[name]([decode(item, stands_for) for item in body])
    if name in MAPPINGS:
        return MAPPINGS[name]([(decode(key, stands_for), decode(item, stands_for)) for key, item in body])
    if name in RARE:
        return RARE[name](body)
    return stands_for(name, body)


def from_parts(kind: Callable[..., Any], parts: list[int]) -> Any:
    return kind(*parts)


def whole(data: Any) -> int:
    return data if isinstance(data, int) else int(data["int"], 16)


RARE: dict[str, Callable[[Any], Any]] = {
    "int": lambda body: int(body, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda body: complex(*body),
    "range": lambda body: range(*map(whole, body)),
    "Decimal": Decimal,
    "Fraction": lambda body: fractions.Fraction(int(body[0], 16), int(body[1], 16)),
    "type": TYPES.__getitem__,
    "error": ERRORS.__getitem__,
    "single": SINGLE.__getitem__,
    **{name: functools.partial(from_parts, kind) for name, (kind, _) in DATES.items()},
}

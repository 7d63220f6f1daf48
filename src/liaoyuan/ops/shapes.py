"""What a public function of the operators takes, said once above it and checked at every call.

    @takes_shapes(x="float [..., H]", weight="float [H]")
    def rms_norm(x, weight, eps): ...

What does not fit is refused here, before a kernel or a reference sees it: so both refuse alike, with names and sizes.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError

P = ParamSpec("P")
R = TypeVar("R")
MOST_REMEMBERED = 10_000  # forms of one function's arguments
KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "same": (),  # the dtype of the first tensor
    "fp64": (torch.float64,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "int32/int64": (torch.int32, torch.int64),
    "bool/int32": (torch.bool, torch.int32),
}


class ShapeError(LiaoyuanError, ValueError):
    """A tensor whose shape, dtype or device does not fit the function or the other tensors."""


@dataclass(frozen=True)
class Expected:
    """A tensor among a function's arguments: where it stands, and what it must be.

    sizes: names, "_" (any) or numbers; counted from the end where more may stand in front (`is_open`).
    """

    name: str
    place: int
    is_optional: bool
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[str, ...]
    is_open: bool

    @property
    def shape(self) -> str:
        return f"[{', '.join(('...', *self.sizes) if self.is_open else self.sizes)}]"


def takes_shapes(
    *, multiple: tuple[str, str] | None = None, **sentences: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that checks a function's tensors by sentences like "int64 [N, K]": a key of `KINDS`, sizes.

    Sizes of one name are equal in all tensors; "_" is any size, "..." in front any sizes, a number itself. An argument
    may be None if its annotation says so. All tensors are on one device.

    Args:
        multiple: names of two sizes, the first of which must be a multiple of the second.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        expected = _read(function, sentences)
        places = tuple((one.place, one.name) for one in expected)
        fitting: set[Any] = set()  # what was found right before: to look it up costs half of checking it

        @functools.wraps(function)
        def checked(*arguments: P.args, **named: P.kwargs) -> R:
            given = len(arguments)
            tensors: Any = [arguments[place] if place < given else named.get(name) for place, name in places]
            forms: tuple[Any, ...] = ()
            if not torch.compiler.is_compiling():
                forms = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
            try:
                is_known = bool(forms) and forms in fitting
            except TypeError:  # sizes are symbols
                is_known, forms = False, ()
            if not is_known:
                _check(function.__name__, tensors, expected, multiple)
                if forms and len(fitting) < MOST_REMEMBERED:
                    fitting.add(forms)
            return function(*arguments, **named)

        return checked

    return decorate


def _read(function: Callable[..., Any], sentences: Mapping[str, str]) -> tuple[Expected, ...]:
    parameters = inspect.signature(function).parameters
    found = []
    for place, (name, parameter) in enumerate(parameters.items()):
        if name in sentences:
            kind, _, shape = sentences[name].partition(" ")
            sizes = tuple(shape.strip("[]").replace(",", " ").split())
            is_open = sizes[:1] == ("...",)
            named = sizes[1:] if is_open else sizes
            is_optional = type(None) in get_args(parameter.annotation)
            found.append(Expected(name, place, is_optional, KINDS[kind], named, is_open))
    return tuple(found)


def _check(
    function: str, tensors: Sequence[Any], expected: tuple[Expected, ...], multiple: tuple[str, str] | None
) -> None:
    """Raise ShapeError if anything is wrong."""
    known: dict[str, tuple[int, str]] = {}  # of every name of a size: how much, and of which argument
    wrong = None
    for x, one in zip(tensors, expected, strict=True):
        wrong = _wrong_alone(x, one, tensors[0], expected[0].name)
        if wrong is None and x is not None:
            wrong = _wrong_size(x, one, known)
        if wrong is not None:
            break
    if wrong is None and multiple is not None:
        (many, first), (few, second) = known[multiple[0]], known[multiple[1]]
        if few == 0 or many % few:
            wrong = f"{first} and {second} do not fit: {multiple[0]}, {many}, is no multiple of {multiple[1]}, {few}"
    if wrong is not None:
        wanted = ", ".join(f"{one.name} {one.shape}" for one in expected)
        raise ShapeError(f"{function}: {wrong}. It takes {wanted}.")


def _wrong_alone(x: Tensor | None, one: Expected, first: Tensor | None, name: str) -> str | None:
    """Return what is wrong with an argument's dtype, dimensions and device (that of the first)."""
    if x is None or first is None:
        return None if one.is_optional else f"{one.name} is missing"
    dtypes = one.dtypes or (first.dtype,)
    if x.dtype not in dtypes:
        return f"{one.name} {list(x.shape)} is {_short(x.dtype)}, not {' or '.join(map(_short, dtypes))}"
    more = len(x.shape) - len(one.sizes)
    if more < 0 or (more and not one.is_open):
        return f"{one.name} {list(x.shape)} is not {one.shape}"
    if x.device != first.device:
        return f"{one.name} {list(x.shape)} is on {x.device}, but {name} {list(first.shape)} on {first.device}"
    return None


def _wrong_size(x: Tensor, one: Expected, known: dict[str, tuple[int, str]]) -> str | None:
    """Return which size is not the one of its name before, and remember those that are new."""
    for size, number in zip(reversed(one.sizes), reversed(x.shape), strict=False):
        if size.isdigit() and number != int(size):
            return f"{one.name} {list(x.shape)} is not {one.shape}"
        before, where = known.setdefault(size, (number, f"{one.name} {list(x.shape)}"))
        if size != "_" and before != number:
            return f"{one.name} {list(x.shape)} does not fit {where}: {size} is {number} and {before}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Stand-ins for objects of the other side: whatever is done with one is asked there, but what decides a test is not.

A stranger's object could call itself equal to anything. So one that is compared with a value of our own is equal only
if it is of a kind of that value (a named tuple, an enumeration of ints) whose plain content is equal; its own `==` is
asked only against objects of its own side, after it has been asked whether it equals something that it cannot know.
Nor does it say how far it is from a value of our own: a difference that is always nought would be as good as an `==`.
"""

import operator
import secrets
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from liaoyuan.safety.apart.values import ERRORS, TYPES

if TYPE_CHECKING:
    from liaoyuan.safety.apart.peer import Peer

ARITHMETIC = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()  # noqa: SIM905
OTHERS = """neg pos abs invert len iter next reversed getitem setitem delitem contains call enter exit bool int float
    index complex round floor ceil trunc bytes str repr format hash eq lt le gt ge""".split()  # noqa: SIM905
OPERATIONS = frozenset(
    [f"__{prefix}{name}__" for name in ARITHMETIC for prefix in ("", "r", "i")] + [f"__{name}__" for name in OTHERS]
)
ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "__lt__": lambda first, second: first < second,
    "__le__": lambda first, second: first <= second,
    "__gt__": lambda first, second: first > second,
    "__ge__": lambda first, second: first >= second,
}
COMPARING: dict[str, Callable[[Any, Any], Any]] = {  # arithmetic that tells how near two values are
    **{f"__{sign}{name}__": getattr(operator, name) for name in ("sub", "xor", "truediv") for sign in ("", "i")},
    "__rsub__": lambda first, second: second - first,
    "__rxor__": lambda first, second: second ^ first,
    "__rtruediv__": lambda first, second: second / first,
}
TOLD = {"__repr__", "__str__", "__format__"}  # for reasons
DECIDED_HERE = {"__eq__", "__contains__", "__call__", "__hash__", *ORDER, *COMPARING}
ASKED_THERE = {"__name__", "__qualname__", "__doc__", "__members__"}  # of the names with two underscores on each side
PLAIN_TYPES = frozenset({*TYPES.values(), type(None), type, type(...)})
LONGEST_NAME = 100
NONE = object()


class CheatError(Exception):
    """An object claims what no honest object claims."""


def operations(kind: type) -> list[str]:
    """Return the operations that a class defines beyond those of every object."""
    found = []
    for name in sorted(OPERATIONS):
        owners = [vars(base)[name] for base in kind.__mro__ if base is not object and name in vars(base)]
        if owners and owners[0] is not None:
            found.append(name)
    return found


def is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in ASKED_THERE


def inner(stand_in: Any) -> dict[str, Any]:
    """Return what a stand-in itself holds: its peer, its place there, its plain content if it has one."""
    look: Callable[[Any, str], Any] = type.__getattribute__ if isinstance(stand_in, type) else object.__getattribute__
    held: dict[str, Any] = look(stand_in, "__dict__")
    return held


def place_of(value: Any, peer: "Peer") -> int | None:
    """Return the number of what a stand-in stands for, or None if the value is no stand-in of this peer's."""
    if isinstance(value, StandInClass) or isinstance(type(value), StandInClass):
        held = inner(value)
        if held.get("_peer") is peer and "_place" in held:
            return int(held["_place"])
    return None


def ask(stand_in: Any, what: str, *words: Any) -> Any:
    held = inner(stand_in)
    return held["_peer"].request(what, held["_place"], *words)


class StandInClass(type):
    """The class of stand-ins for classes: real classes, so that `except`, `isinstance` and subclasses work."""

    def __getattr__(cls, name: str) -> Any:
        if is_special(name) or "_peer" not in inner(cls):
            raise AttributeError(name)
        return ask(cls, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if is_special(name) or name.startswith("_abc_"):
            super().__setattr__(name, value)
        else:
            ask(cls, "set", name, value)

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return ask(cls, "call", arguments, named)

    def __iter__(cls) -> Any:
        return ask(cls, "operate", "__iter__")

    def __len__(cls) -> int:
        return ask(cls, "operate", "__len__")

    def __bool__(cls) -> bool:
        return True

    def __getitem__(cls, key: Any) -> Any:
        return ask(cls, "operate", "__getitem__", key)

    def __contains__(cls, item: Any) -> bool:
        return any(item == member for member in cls)


class StandIn(metaclass=StandInClass):
    """The base of stand-ins for objects."""

    def __getattr__(self, name: str) -> Any:
        if is_special(name):
            raise AttributeError(name)
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if is_special(name):
            object.__setattr__(self, name, value)
        else:
            ask(self, "set", name, value)

    def __repr__(self) -> str:
        return ask(self, "operate", "__repr__")

    def __str__(self) -> str:
        return ask(self, "operate", "__str__")

    def __eq__(self, other: object) -> Any:
        held = inner(self)
        if place_of(other, held["_peer"]) is not None:
            return self is other or own_equality(self, other)
        if held["_plain"] is not NONE:
            return held["_plain"] == other
        return False if type(other) in PLAIN_TYPES else NotImplemented

    def __hash__(self) -> int:
        held = inner(self)
        return hash(held["_place"] if held["_plain"] is NONE else held["_plain"])


def own_equality(first: Any, second: Any) -> Any:
    """Ask an object whether it equals another one of its side; raises CheatError if it equals what it cannot know."""
    if "__eq__" not in type(first)._operations:
        return False
    refuse_claims(first, "__eq__", secrets.token_hex(8))
    return ask(first, "operate", "__eq__", second)


def refuse_claims(stand_in: Any, name: str, unknown: Any) -> None:
    """Raise CheatError if the answer about a value that nobody could expect is yes."""
    try:
        claims = ask(stand_in, "operate", name, unknown)
    except Exception:
        return
    if claims is not NotImplemented and claims:
        raise CheatError(f"an object whose {name} says yes to anything")


def contains(stand_in: Any, item: Any) -> bool:
    """Look for an item among what an object yields; one that yields nothing is asked."""
    if "__iter__" in type(stand_in)._operations:
        return any(item is member or item == member for member in stand_in)
    refuse_claims(stand_in, "__contains__", secrets.randbits(60) if isinstance(item, int) else secrets.token_hex(8))
    return bool(ask(stand_in, "operate", "__contains__", item))


def ordered(name: str) -> Callable[[Any, Any], Any]:
    """Return the comparison called `name`: by plain content against our own values, asked against its own side's."""

    def compare(self: Any, other: Any) -> Any:
        held = inner(self)
        if place_of(other, held["_peer"]) is not None:
            return ask(self, "operate", name, other)
        return NotImplemented if held["_plain"] is NONE else ORDER[name](held["_plain"], other)

    return compare


def forwarded(name: str) -> Callable[..., Any]:
    def operate(self: Any, *arguments: Any) -> Any:
        found = ask(self, "operate", name, *arguments)
        return still_near(found, name) if "_near" in inner(self) else found

    return operate


def compared(name: str) -> Callable[[Any, Any], Any]:
    """Return the arithmetic called `name`, as `ordered` does; with a value of ours it may give an object alone."""

    def operate(self: Any, other: Any) -> Any:
        held = inner(self)
        if place_of(other, held["_peer"]) is not None:
            return ask(self, "operate", name, other)
        if held["_plain"] is not NONE:
            return COMPARING[name](held["_plain"], other)
        found = ask(self, "operate", name, other)
        return still_near(found, name) if held["_peer"].load is None else found  # the side that loads decides nothing

    return operate


def still_near(found: Any, name: str) -> Any:
    """Mark an object that came of comparing with one of ours; raises CheatError if it says how near it is to it."""
    if name in TOLD or found is NotImplemented:
        return found
    if not isinstance(type(found), StandInClass) or inner(found).get("_plain", NONE) is not NONE:
        raise CheatError(f"an object whose {name} says how near it is to a value of the tests")
    inner(found)["_near"] = True
    return found


def hashed(self: Any) -> int:
    held = inner(self)
    return hash(ask(self, "operate", "__hash__") if held["_plain"] is NONE else held["_plain"])


def call(self: Any, *arguments: Any, **named: Any) -> Any:
    return ask(self, "call", arguments, named)


def make_class(name: str, bases: Iterable[Any], found: Iterable[str]) -> type:
    """Make the class of stand-ins for objects with these operations."""
    known = sorted(OPERATIONS.intersection(found))
    space: dict[str, Any] = {operation: forwarded(operation) for operation in known if operation not in DECIDED_HERE}
    space |= {operation: ordered(operation) for operation in ORDER if operation in known}
    space |= {operation: compared(operation) for operation in COMPARING if operation in known}
    if "__call__" in known:
        space["__call__"] = call
    if "__contains__" in known:
        space["__contains__"] = contains
    if "__eq__" in known:
        space |= {"__eq__": StandIn.__eq__, "__hash__": hashed if "__hash__" in known else None}
    real = [
        base for base in bases if isinstance(base, type) and (isinstance(base, StandInClass) or base in ERRORS.values())
    ]
    if not any(isinstance(base, StandInClass) for base in real):
        real.insert(0, StandIn)
    space["_operations"] = frozenset(known)
    return StandInClass(name[:LONGEST_NAME], tuple(dict.fromkeys(real)), space)


def make(peer: "Peer", place: int, portrait: dict[str, Any]) -> Any:
    """Make the stand-in of what the other side describes so; raises ValueError for what is no description."""
    held = {"_peer": peer, "_place": int(place)}
    if "class" in portrait:
        bases = [peer.decode(base) for base in portrait["bases"]]
        made = make_class(str(portrait["class"]), bases, portrait["operations"])
        for name, value in held.items():
            type.__setattr__(made, name, value)
        return made
    kind = peer.decode(portrait["of"]) if "of" in portrait else None
    if not isinstance(kind, StandInClass):
        kind = make_class("object", (), portrait["operations"])
    made = kind.__new__(kind)  # type: ignore[call-overload]
    inner(made).update(held, _plain=peer.decode(portrait["plain"]) if "plain" in portrait else NONE)
    return made

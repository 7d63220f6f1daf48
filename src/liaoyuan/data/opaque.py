"""Stand-ins for the texts and JSON values of a conversation, which notice what a chat template wants to know of them.

Templates are slow, and most conversations have the same shape. So a shape is rendered once, on opaque texts, and filled
in for every conversation that the template could not have told apart from it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

GUARD = "\ue000"  # stands around the number of a text, or of a special token's text, while a template is filled in


@dataclass
class Seen:
    """What a template asked of the opaque texts: what they do not contain, and what they are not."""

    parts: set[str]
    wholes: set[str]

    def fits(self, text: str) -> bool:
        """Return whether the template must treat `text` as it treated the opaque one that stood for it."""
        edges_are_plain = not (text[0].isspace() or text[-1].isspace())
        return edges_are_plain and text not in self.wholes and not any(part in text for part in self.parts)


class Inspected(Exception):  # noqa: N818  (no error: the template is only read in the ordinary way)
    """A template looked into a text in a way that `Opaque` does not know."""


class Opaque(str):
    """A stand-in for a text that is not empty and neither begins nor ends with a space.

    A template may write it out, strip it and ask whether certain things are in it, which is noted; then every text
    without those things gives the same result. Anything else raises `Inspected`.

    json: the stand-in for this text as JSON, if a template may have that.
    """

    seen: Seen
    json: str | None

    def __new__(cls, text: str, seen: Seen, json: str | None = None) -> "Opaque":
        made = super().__new__(cls, text)
        made.seen, made.json = seen, json
        return made

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        self._whole(other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, part: object) -> bool:
        self._part(part)
        return False

    def __add__(self, other: str) -> "Composed":
        return Composed(str.__add__(self, other))

    def __radd__(self, other: str) -> "Composed":
        return Composed(str.__add__(other, self))

    def strip(self, characters: str | None = None) -> "Opaque":
        if characters is not None and characters.strip():
            _refuse()
        return self

    lstrip = rstrip = strip

    def startswith(self, prefix: Any, *_: Any) -> bool:
        self._part(prefix)
        return False

    endswith = startswith

    def split(self, separator: Any = None, *_: Any) -> list[str]:
        self._part(separator)
        return [self]

    rsplit = split  # type: ignore[assignment]

    def replace(self, old: Any, *_: Any) -> "Opaque":
        self._part(old)
        return self

    def _part(self, part: Any) -> None:
        if isinstance(part, Opaque | Composed) or not isinstance(part, str) or not part:
            _refuse()
        self.seen.parts.add(part)

    def _whole(self, text: str) -> None:
        if isinstance(text, Opaque | Composed):
            _refuse()
        self.seen.wholes.add(text)


class Composed(str):
    """Text that a template put together with an opaque one: it may be stripped at plain edges, and written out."""

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: str) -> "Composed":
        return Composed(str.__add__(self, other))

    def __radd__(self, other: str) -> "Composed":
        return Composed(str.__add__(other, self))

    def strip(self, characters: str | None = None) -> "Composed":
        if characters is not None and characters.strip():
            _refuse()
        return Composed(str.strip(self, characters))

    def lstrip(self, characters: str | None = None) -> "Composed":
        if characters is not None and characters.strip():
            _refuse()
        return Composed(str.lstrip(self, characters))

    def rstrip(self, characters: str | None = None) -> "Composed":
        if characters is not None and characters.strip():
            _refuse()
        return Composed(str.rstrip(self, characters))


class OpaqueObject(dict[str, Any]):
    """A stand-in for a JSON object that is not empty: a template may ask whether it is there, and write it as JSON."""

    json: str

    def __init__(self, json: str) -> None:
        super().__init__()
        self.json = json

    def __bool__(self) -> bool:
        return True


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise Inspected("a template looked into a text")


def _close(kind: type[str] | type[dict[str, Any]]) -> None:
    """Make every method of texts, or of objects, that `kind` does not define raise `Inspected`."""
    free = {"__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__dir__", "__doc__", "__reduce__"}
    free |= {"__init_subclass__", "__subclasshook__", "__getnewargs__", "__reduce_ex__", "__delattr__", "__getstate__"}
    for name in dir(kind.__mro__[1]):
        if name not in free and name not in vars(kind):
            setattr(kind, name, _refuse)


_close(Opaque)
_close(Composed)
_close(OpaqueObject)


def stand_in(number: int, seen: Seen) -> Opaque:
    """Return the opaque text number `number` of a conversation."""
    return Opaque(_mark(number), seen)


def json_stand_in(number: int, seen: Seen) -> Opaque:
    """Return the opaque text number `number`, whose JSON is text number `number + 1`."""
    return Opaque(_mark(number), seen, _mark(number + 1))


def object_stand_in(number: int) -> OpaqueObject:
    """Return the opaque object whose JSON is text number `number`."""
    return OpaqueObject(_mark(number))


def json_of(value: Any) -> Composed | None:
    """Return the JSON of a value with the stand-ins in it, on one line; None if there are none.

    Raises:
        Inspected: a stand-in in it cannot be written as JSON.
    """
    if not is_opaque(value):
        return None
    text = json.dumps(_revealed(value), ensure_ascii=False)
    return Composed(re.sub(f'"({GUARD}[0-9]+{GUARD})"', r"\1", text))


def is_opaque(value: Any) -> bool:
    """Return whether a value holds a stand-in, however deep."""
    if isinstance(value, Opaque | Composed | OpaqueObject):
        return True
    if isinstance(value, Mapping):
        return any(is_opaque(item) for pair in value.items() for item in pair)
    return isinstance(value, list | tuple) and any(is_opaque(item) for item in value)


def _mark(number: int) -> str:
    return f"{GUARD}{number}{GUARD}"


def _revealed(value: Any) -> Any:
    """Return a value with the marks of JSON in place of its stand-ins."""
    if isinstance(value, Opaque | OpaqueObject):
        return value.json or _refuse()
    if isinstance(value, Composed):
        _refuse()
    if isinstance(value, Mapping):
        return {_revealed(key): _revealed(item) for key, item in value.items()}
    return [_revealed(item) for item in value] if isinstance(value, list | tuple) else value

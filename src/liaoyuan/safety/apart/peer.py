"""One end of the two pipes: requests to the other side, and answers to its requests, one inside the other.

A frame is four bytes of length and JSON. A request is ["get" | "set" | "call" | "operate" | "load", number, ...], an
answer ["value", ...] or ["error", ...]. While one side waits for its answer it serves requests: functions that the
tests hand over are called back.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from liaoyuan.safety.apart import stand_ins, values

LARGEST_FRAME = 32 << 20  # bytes
OPERATIONS = stand_ins.OPERATIONS


class GoneError(Exception):
    """The other side is gone, or what it sends is no answer."""


class Peer:
    """Holds what stays here and is known there by number, and the stand-ins of what stays there.

    guard: says whether the other side may do something with an object that stays here; it raises if not.
    """

    def __init__(self, reading: int, writing: int, guard: Callable[[Any, str, str], None]) -> None:
        self.reading, self.writing, self.guard = reading, writing, guard
        self.kept: list[Any] = []  # the number of an object is its place
        self.places: dict[int, int] = {}  # by id(): what is kept is never freed, so no id comes back
        self.known: dict[int, Any] = {}
        self.lock = threading.RLock()
        self.load: Callable[[str], Any] | None = None
        self.gone = False

    def request(self, *words: Any) -> Any:
        """Ask the other side and return its answer; raises what it says was raised there."""
        with self.lock:
            try:
                return self.ask(words)
            except GoneError:  # once and for all: what is answered after it answers something else
                self.gone = True
                raise

    def ask(self, words: Sequence[Any]) -> Any:
        if self.gone:
            raise GoneError("the other side is gone")
        self.send([words[0], words[1], *(self.encode(word) for word in words[2:])])
        while True:
            kind, *body = self.receive()
            if kind == "value":
                return self.decode(body[0])
            if kind == "error":
                raise self.error(body[0])
            self.answer(kind, body)

    def serve(self) -> None:
        """Answer requests until the other side is gone."""
        while True:
            kind, *body = self.receive()
            self.answer(kind, body)

    def answer(self, kind: Any, body: list[Any]) -> None:
        try:
            reply = ["value", self.encode(self.do(kind, *body))]
        except GoneError:
            raise
        except BaseException as error:
            reply = ["error", self.describe(error)]
        self.send(reply)

    def do(self, kind: str, number: Any, *words: Any) -> Any:
        """Do what the other side asks with one of the objects that stay here."""
        if kind == "load" and self.load is not None:
            return self.load(str(number))
        target, arguments = self.kept[number], [self.decode(word) for word in words]
        if kind == "call":
            self.guard(target, "call", "")
            return target(*arguments[0], **arguments[1])
        name = arguments.pop(0)
        self.guard(target, kind, name)
        if kind == "get":
            return getattr(target, name)
        if kind == "set":
            return setattr(target, name, *arguments)
        if kind == "operate" and name in OPERATIONS:
            return getattr(type(target), name)(target, *arguments)
        raise ValueError(f"there is no request {kind!r}")

    def encode(self, value: Any) -> Any:
        return values.encode(value, self.stay)

    def decode(self, data: Any) -> Any:
        try:
            return values.decode(data, self.stands_for)
        except Exception as error:
            raise GoneError(f"no value: {error!r}") from None

    def stay(self, value: Any) -> dict[str, Any]:
        """Return the stand-in of an object that stays where it is; raises TypeError if it may not be known there."""
        place = stand_ins.place_of(value, self)
        if place is not None:
            return {"yours": place}
        if id(value) in self.places:
            return {"mine": self.places[id(value)]}
        self.guard(value, "show", "")
        place = self.places[id(value)] = len(self.kept)
        self.kept.append(value)
        return {"new": [place, self.portrait(value)]}

    def portrait(self, value: Any) -> dict[str, Any]:
        """Return what the other side must know of an object to make its stand-in."""
        if isinstance(value, type):
            bases = [self.encode(base) for base in value.__bases__ if base is not object and base not in values.PLAIN]
            return {"class": value.__name__, "bases": bases, "operations": stand_ins.operations(value)}
        kind = type(value)
        own = kind.__module__ not in ("builtins", "functools") and not isinstance(value, BaseException)
        found: dict[str, Any] = {"operations": stand_ins.operations(kind), "callable": callable(value)}
        if own or isinstance(value, BaseException):
            found["of"] = self.encode(kind)
        for base in values.PLAIN:
            if isinstance(value, base):
                found["plain"] = self.encode(base(value))
                break
        return found

    def stands_for(self, name: str, body: Any) -> Any:
        """Return what a stand-in of the other side means here."""
        if name == "yours":
            return self.kept[body]
        if name == "mine":
            return self.known[body]
        if name == "new":
            number, portrait = body
            self.known[number] = stand_ins.make(self, number, portrait)
            return self.known[number]
        raise ValueError(f"there is no kind of value {name!r}")

    def describe(self, error: BaseException) -> dict[str, Any]:
        """Return an exception as JSON: its class, arguments and words, and what stands for it."""
        kind = type(error)
        if kind in values.ERRORS.values():
            number = None
        elif isinstance(error, Exception):
            number = self.stay(error)
        else:
            kind, number = RuntimeError, None
            error = RuntimeError(f"it ended by {type(error).__name__}")
        try:
            arguments = self.encode(error.args)
        except Exception:
            arguments = self.encode((str(error),))
        return {"class": self.encode(kind), "arguments": arguments, "stand_in": number}

    def error(self, data: dict[str, Any]) -> BaseException:
        """Return the exception that the other side describes, made here."""
        try:
            kind, arguments = self.decode(data["class"]), self.decode(data["arguments"])
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise GoneError("what is raised is no exception")
            if data["stand_in"] is not None:
                stand_in = self.decode(data["stand_in"])
                if isinstance(stand_in, Exception):
                    BaseException.args.__set__(stand_in, arguments)  # type: ignore[attr-defined]
                    return stand_in
            try:
                made = kind(*arguments)
            except Exception:
                made = kind.__new__(kind)
            return made if isinstance(made, Exception) else GoneError("no exception")
        except GoneError:
            raise
        except Exception as error:
            raise GoneError(f"no exception: {error!r}") from None

    def send(self, message: list[Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > LARGEST_FRAME:
            raise ValueError(f"a value of {len(data)} bytes is too large to be sent")
        view = memoryview(struct.pack(">I", len(data)) + data)
        try:
            while view:
                view = view[os.write(self.writing, view) :]
        except OSError:
            raise GoneError("the other side is gone") from None

    def receive(self) -> list[Any]:
        (length,) = struct.unpack(">I", self.read(4))
        if length > LARGEST_FRAME:
            raise GoneError("an answer of too many bytes")
        try:
            message = json.loads(self.read(length))
        except (ValueError, RecursionError):
            raise GoneError("an answer that is no JSON") from None
        if not isinstance(message, list) or len(message) < 2:
            raise GoneError("an answer of another kind")
        return message

    def read(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self.reading, min(count, 1 << 20))
            if not part:
                raise GoneError("the other side is gone")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

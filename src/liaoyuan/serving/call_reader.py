"""Reads tool calls out of an answer as it comes: what is said apart from what is called.

However the text is cut into pieces, the outcome is the same. What is no call of a known tool is part of the content;
a call that breaks off or goes wrong in mid-arguments is brought to an end that is valid JSON.
"""

import json
import secrets
import string
from collections.abc import Generator, Mapping
from typing import Any

from liaoyuan.serving.json_text import SPACE, JsonText
from liaoyuan.serving.tools import CallFormat, CallPiece

MOST_NAME = 256  # characters of a tool's or argument's name
MOST_MISTAKES = 16  # beginnings of calls that are none; after so many the rest is content

Reading = Generator[None, None, Any]  # pauses where it needs more text


class _WrongError(Exception):
    """This is no call, or not the call that it began as."""


class _EndedError(Exception):
    """The text ended in mid-call."""


class CallReader:
    """Reads the content of one answer. tools: names of those offered, with the JSON schema of their arguments."""

    def __init__(self, form: CallFormat, tools: Mapping[str, dict[str, Any]], most: int | None = None) -> None:
        """most: how many calls are wanted; after them the reader is `done`, and the rest is left out."""
        self._form, self._tools, self._most = form, tools, most
        self._text, self._at, self._ended = "", 0, False
        self._content, self._pieces = "", list[CallPiece]()
        self._spaces = ""  # white space that is content only if more content follows
        self._begun = False  # something came that is no white space
        self.count, self.done = 0, False  # calls so far
        self._arguments: JsonText | None = None  # of the call that is open
        self._shown = False  # something of them
        self._reading = self._answer()

    def feed(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        """Return the content and the pieces of calls that a text adds."""
        self._text += text
        return self._advance()

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        """Return what the end of the answer adds."""
        self._ended = True
        return self._advance()

    def _advance(self) -> tuple[str, tuple[CallPiece, ...]]:
        if not self.done:
            next(self._reading, None)
        content, pieces = self._content, tuple(self._pieces)
        self._content, self._pieces = "", []
        return content, pieces

    def _answer(self) -> Reading:
        mistakes = 0
        while mistakes < MOST_MISTAKES and (yield from self._say_until_trigger()):
            begin, before = self._at, self.count
            try:
                yield from self._calls()
            except (_WrongError, _EndedError):
                if self.count > before:
                    yield from self._break_off()
                else:
                    mistakes += 1
                    self._at = begin + max(1, len(self._form.trigger))
                    self._say(self._text[begin : self._at])
            if self.done:
                return
        while True:
            self._say_up_to(len(self._text))
            if self._ended:
                return
            yield

    # Content.

    def _say_until_trigger(self) -> Reading:
        """Give out content up to the beginning of a call; return whether there is one."""
        trigger = self._form.trigger
        if not trigger:
            return (yield from self._is_bare())
        while True:
            found = self._text.find(trigger, self._at)
            held = 0 if self._ended else _overlap(self._text, trigger, self._at)
            self._say_up_to(found if found >= 0 else len(self._text) - held)
            if found >= 0 or self._ended:
                return found >= 0
            yield

    def _is_bare(self) -> Reading:
        """Whether a call without marks begins here: with the answer, or right after another call."""
        if self._begun and not self.count:
            return False
        begin, between = self._at, self._form.between.strip()
        yield from self._skip_space()
        if self.count and self._text.startswith(between, self._at):
            self._at += len(between)
            yield from self._skip_space()
        is_call = self._text.startswith("{", self._at)
        self._at = self._at if is_call else begin
        return is_call

    def _say_up_to(self, end: int) -> None:
        """Give out the text up to a place and forget it."""
        self._say(self._text[self._at : end])
        self._text, self._at = self._text[end:], 0

    def _say(self, text: str) -> None:
        """Give out content; white space around calls is content only if more content follows."""
        said = self._spaces + text
        kept = said if self._ended and not self.count else said.rstrip(SPACE)
        self._content += kept
        self._spaces = said[len(kept) :]
        self._begun = self._begun or bool(kept)

    # Calls.

    def _calls(self) -> Reading:
        form = self._form
        yield from self._expect(form.open)
        while True:
            yield from self._expect(form.start)
            yield from self._object() if form.style == "object" else self._named()
            yield from self._expect(form.end)
            if self.done or not form.open:
                return
            yield from self._skip_space()
            if (yield from self._sees(form.close.split()[0])):
                yield from self._expect(form.close)
                return
            yield from self._expect(form.between)

    def _break_off(self) -> Reading:
        """End a call that has gone wrong, and leave out the rest of it."""
        if self._arguments is not None:
            self._end_call()
        mark = next(iter((self._form.end or self._form.close).split()[-1:]), "")
        while (found := self._text.find(mark, self._at) if mark else -1) < 0 and not self._ended:
            yield
        self._at = len(self._text) if found < 0 else found + len(mark)

    def _object(self) -> Reading:
        """Read {"name": ..., "arguments": ...}; arguments that come before the name wait for it."""
        name, waiting, before = "", "", self.count
        yield from self._expect("{")
        while True:
            key = yield from self._string()
            yield from self._expect(":")
            if key == "name":
                name = self._known((yield from self._string()))
            elif key not in ("arguments", "parameters") or self.count > before:
                yield from self._value()
            elif name:
                self._announce(name)
                yield from self._stream_arguments()
            else:
                waiting = yield from self._value()
            yield from self._skip_space()
            separator = yield from self._character()
            if separator == "}":
                break
            if separator != ",":
                raise _WrongError
        if self.count == before:
            self._announce(self._known(name))
            self._show(_as_object(waiting) if waiting else "")
            self._end_call()

    def _known(self, name: Any) -> str:
        """Return a name if it is a tool's."""
        if not isinstance(name, str) or name not in self._tools:
            raise _WrongError
        return name

    def _stream_arguments(self) -> Reading:
        """Show an object as it comes; a text of an object (some models quote it twice) or null in one piece."""
        yield from self._skip_space()
        if (yield from self._sees("{")):
            while self._arguments is not None and not self._arguments.done:
                self._show((yield from self._character()))
        else:
            self._show(_as_object((yield from self._value())))
        self._end_call()

    def _named(self) -> Reading:
        form = self._form
        stop = form.separator.strip() or form.key_open
        name = yield from self._until(stop, form.end)
        name = self._known(name.partition("[CALL_ID]")[0].strip())  # some of Mistral's models say an id
        self._announce(name)
        if not (form.style == "tagged" and (yield from self._sees(form.end))):
            yield from self._expect(form.separator)
        yield from self._tagged(self._tools[name]) if form.style == "tagged" else self._stream_arguments()

    def _tagged(self, schema: dict[str, Any]) -> Reading:
        """Read arguments that are marked by name, and show them as members of an object."""
        form, opening = self._form, "{"
        yield from self._skip_space()
        while (yield from self._sees(form.key_open)):
            self._at += len(form.key_open)
            key = yield from self._until(form.key_close.split()[0], "")
            yield from self._expect(form.key_close)
            if form.key_close.endswith("\n") and (yield from self._sees("\n")):
                self._at += 1
            self._show(f"{opening}{json.dumps(key.strip(), ensure_ascii=False)}: ")
            yield from self._tagged_value(_is_text(schema, key.strip()))
            opening = ", "
            yield from self._skip_space()
        self._show("{}" if opening == "{" else "}")
        self._end_call()

    def _tagged_value(self, is_text: bool) -> Reading:
        close = self._form.value_close.rstrip()
        if not is_text:
            self._show(_as_value((yield from self._until(close, "", most=None))))
            self._at += len(close)
            return
        self._show('"')
        while (found := self._text.find(close, self._at)) < 0 and not self._ended:
            self._show_text(len(self._text) - _overlap(self._text, close, self._at))
            yield
        self._show_text(found if found >= 0 else len(self._text))
        if found < 0:
            raise _EndedError
        self._show('"')
        self._at += len(close)

    def _show_text(self, end: int) -> None:
        """Show the text up to a place as the inside of a JSON string."""
        self._show(json.dumps(self._text[self._at : end], ensure_ascii=False)[1:-1])
        self._at = end

    def _announce(self, name: str) -> None:
        """Say that a tool is called."""
        self._spaces = ""
        self._pieces.append(CallPiece(self.count, _call_id(self._form.id_length), name))
        self._arguments, self._shown = JsonText(), False
        self.count += 1

    def _show(self, text: str) -> None:
        """Show text of the arguments, as far as they can still be ended as valid JSON."""
        assert self._arguments is not None
        try:
            self._piece("".join(self._arguments.feed(character) for character in text))
        except ValueError:
            raise _WrongError from None

    def _piece(self, shown: str) -> None:
        if shown:
            self._pieces.append(CallPiece(self.count - 1, arguments=shown))
            self._shown = True

    def _end_call(self) -> None:
        """End the arguments as valid JSON."""
        assert self._arguments is not None
        self._piece(self._arguments.close() if self._shown else "{}")
        self._arguments = None
        self.done = self._most is not None and self.count >= self._most

    # Reading, with a pause wherever more text is needed.

    def _character(self) -> Reading:
        while self._at >= len(self._text):
            if self._ended:
                raise _EndedError
            yield
        self._at += 1
        return self._text[self._at - 1]

    def _skip_space(self) -> Reading:
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return
            yield

    def _sees(self, mark: str) -> Reading:
        """Whether a mark comes next."""
        while len(self._text) - self._at < len(mark) and not self._ended:
            if not mark.startswith(self._text[self._at :]):
                return False
            yield
        return self._text.startswith(mark, self._at)

    def _expect(self, mark: str) -> Reading:
        """Read a mark, with any white space before it and within it."""
        for part in mark.split():
            yield from self._skip_space()
            for character in part:
                if (yield from self._character()) != character:
                    raise _WrongError

    def _until(self, mark: str, other: str, most: int | None = MOST_NAME) -> Reading:
        """Return the text before a mark, or before the other one; that comes next."""
        begin = self._at
        while True:
            found = [at for each in (mark, other) if each and (at := self._text.find(each, begin)) >= 0]
            if found:
                self._at = min(found)
                return self._text[begin : self._at]
            if most is not None and len(self._text) - begin > most:
                raise _WrongError
            if self._ended:
                raise _EndedError
            yield

    def _value(self) -> Reading:
        """Return the text of a JSON value."""
        checked = JsonText()
        yield from self._skip_space()
        begin = self._at
        while not checked.done:
            character = yield from self._character()
            try:
                checked.feed(character)
            except ValueError:
                if not checked.done:  # a number or a literal ends with the character after it
                    raise _WrongError from None
                self._at -= 1
        return self._text[begin : self._at]

    def _string(self) -> Reading:
        yield from self._skip_space()
        if not (yield from self._sees('"')):
            raise _WrongError
        return json.loads((yield from self._value()), strict=False)


def _overlap(text: str, mark: str, begin: int) -> int:
    """Return the length of the longest end of text[begin:] that is a beginning of `mark` (and not all of it)."""
    longest = min(len(text) - begin, len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)


def _as_object(text: str) -> str:
    """Return the JSON text of an object that was given as such, as a text of it, or as null; else of an empty one."""
    value = json.loads(text, strict=False)
    if isinstance(value, str):
        try:
            value = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            value = None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else "{}"


def _is_text(schema: Mapping[str, Any], key: str) -> bool:
    """Whether an argument is a text by its schema, or has none."""
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, dict) else None
    if not isinstance(found, dict) or not found:
        return True
    if "type" not in found and isinstance(found.get("enum"), list):
        return all(isinstance(value, str) for value in found["enum"])
    return found.get("type") == "string"


def _as_value(text: str) -> str:
    """Return a value that was written without quotes as JSON: as it is if it is JSON, else as a text."""
    try:
        value = json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        value = text.strip()
    return json.dumps(value, ensure_ascii=False)


def _call_id(length: int) -> str:
    if not length:
        return "call_" + secrets.token_hex(12)
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))

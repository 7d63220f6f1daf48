"""Which tokens of a conversation are learned: exactly those that the model itself would write.

The loss mask is not searched for in the text: `outline` finds where answers stand by rendering their prompts. What is
learned is encoded as the model would write it; the ids of the whole are those that `Tokenizer.render` gives, unless the
last character of a prompt would be joined to the first one of its answer, which no model can write.
"""

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from liaoyuan.data.encoding import Encoder, Rendered
from liaoyuan.data.opaque import GUARD, OpaqueObject, Seen, json_stand_in, object_stand_in, stand_in
from liaoyuan.data.outline import Piece, outline
from liaoyuan.data.record_tokens import TokenisedRecord
from liaoyuan.data.records import Message, Record, conversations
from liaoyuan.data.template import only_places_texts, plain_messages
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError

Shape = tuple[str, ...]  # what a conversation has, in order: tools, roles, and which fields of a message are not empty
TEXTS = ("content", "think", "tool_call_id", "name")  # of a message
TOOL_CALLS = "tool_calls"
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode
Segment = tuple[list[int], float]  # ids, and the loss weight of each of them


@dataclass(frozen=True)
class Form:
    """A shape of conversation, rendered: pieces of text and numbers of the texts that go between them.

    items: literal text, or the number of a text of the conversation. ends: after which item each piece ends.
    learned: the number of the message that is learned in each piece.
    """

    items: list[str | int]
    ends: list[int]
    learned: list[int | None]


@dataclass
class Renderer:
    """Renders conversations of one tokenizer in pieces; what it has learned of their shapes makes it fast."""

    tokenizer: Tokenizer
    _forms: dict[Shape, Form | None] = field(default_factory=dict)
    _prompts: dict[Shape, tuple[str, str]] = field(default_factory=dict)  # by the shape before them
    _seen: Seen = field(default_factory=lambda: Seen(set(), set()))

    def __post_init__(self) -> None:
        self._is_plain = only_places_texts(self.tokenizer.template_text)

    def __call__(self, record: Record) -> Rendered:
        """Return the rendered conversation.

        Raises:
            LiaoyuanError: nothing is to be learned from it, or the template is missing, refuses it, or does not show
                where its answer is; the record is named.
        """
        if record.kind == "text":
            return self._text(record)
        if self._is_plain:
            found = self._by_form(record)
            if found:
                return found
        try:
            guarded, tools, hidden = self.tokenizer.guard(plain_messages(record.messages), record.tools)
            pieces = outline(self.tokenizer, guarded, tools)
        except LiaoyuanError as error:
            raise LiaoyuanError(f"Record {record.id!r}: {error}") from error
        return Rendered([text for text, _ in pieces], _weights(pieces, record.messages), hidden)

    def _by_form(self, record: Record) -> Rendered | None:
        """Return the conversation rendered by the form of its shape, if the template cannot tell it from that."""
        texts: list[str] = []
        try:
            shape = _shape(record, texts)
        except (RecursionError, TypeError, ValueError):  # what is no JSON is told with the record, in the ordinary way
            return None
        if shape not in self._forms:
            self._forms[shape] = self._form(record, shape)
        form = self._forms[shape]
        if form is None or not self._fits(texts):
            return None
        filled = [item if isinstance(item, str) else texts[item] for item in form.items]
        begins = [0, *form.ends]
        pieces = ["".join(filled[begin:end]) for begin, end in zip(begins, form.ends, strict=False)]
        messages = record.messages
        weights = [0.0 if number is None else messages[number].weight for number in form.learned]
        return Rendered(pieces, weights)

    def _fits(self, texts: Sequence[str]) -> bool:
        together = "\0".join(texts)
        return (
            all(map(operator.eq, texts, map(str.strip, texts)))
            and self._seen.wholes.isdisjoint(texts)
            and not any(part in together for part in self._seen.parts)
            and not self.tokenizer.must_be_guarded(together)
            and _is_unicode(together)
        )

    def _form(self, record: Record, shape: Shape) -> Form | None:
        """Return the form of a shape; None if the template looks into texts, or refuses the shape."""
        if (record.tools or TOOL_CALLS in shape) and not self.tokenizer.shows_in_json:
            return None
        rows, tools, ends = _stand_ins(record, self._seen)
        beginnings = [shape[:end] for end in ends]
        known = {place: self._prompts[key] for place, key in enumerate(beginnings) if key in self._prompts}
        try:
            form = _as_form(outline(self.tokenizer, rows, tools or None, known))
        except Exception:  # the template can do whatever it likes with the stand-ins: it gets the texts themselves
            return None
        self._prompts |= {beginnings[place]: prompts for place, prompts in known.items()}
        return form

    def _text(self, record: Record) -> Rendered:
        """A text stands between two tokens that end a text, as in a corpus."""
        end = self.tokenizer.end_of_text_id
        token = None if end is None else self.tokenizer.spelling(end)
        if token is None:
            raise LiaoyuanError("The tokenizer has no token that ends a text (bos_token or eos_token).")
        (row,), _, hidden = self.tokenizer.guard([{"role": "user", "content": record.messages[0].content}])
        return Rendered([token, f"{row['content']}{token}"], [0.0, record.messages[0].weight], hidden)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shape(record: Record, texts: list[str]) -> Shape:
    """Return the shape of a conversation, and append its texts, in the order of the numbers of their stand-ins."""
    shape: list[str] = []
    for tool in record.tools:
        shape.append("tools")
        texts.append(TO_JSON(tool))
    for message in record.messages:
        values = message.__dict__  # a million times over, the fields themselves are quicker than attributes
        shape.append(values["role"])
        for name in TEXTS:
            text = values[name]
            if text:
                shape.append(name)
                texts.append(text)
        for call in values[TOOL_CALLS]:
            shape.append(TOOL_CALLS)
            texts += (call.name, TO_JSON(call.name))
            if call.arguments:
                shape.append("arguments")
                texts.append(TO_JSON(call.arguments))
            if call.id:
                shape.append("id")
                texts += (call.id, TO_JSON(call.id))
    return tuple(shape)


def _stand_ins(record: Record, seen: Seen) -> tuple[list[dict[str, Any]], list[OpaqueObject], list[int]]:
    """Return messages and tools as templates take them, of stand-ins; and where in the shape each message begins."""
    tools = [object_stand_in(number) for number in range(len(record.tools))]
    number, place = len(tools), len(tools)
    rows, begins = [], []
    for message in record.messages:
        begins.append(place)
        place += 1
        row: dict[str, Any] = {"role": message.role, "content": ""}
        for name in TEXTS:
            if getattr(message, name):
                row["reasoning_content" if name == "think" else name] = stand_in(number, seen)
                number, place = number + 1, place + 1
        for call in message.tool_calls:
            function: dict[str, Any] = {"name": json_stand_in(number, seen), "arguments": {}}
            number, place = number + 2, place + 1
            told: dict[str, Any] = {"type": "function", "function": function}
            if call.arguments:
                function["arguments"] = object_stand_in(number)
                number, place = number + 1, place + 1
            if call.id:
                told = {"id": json_stand_in(number, seen), **told}
                number, place = number + 2, place + 1
            row.setdefault(TOOL_CALLS, []).append(told)
        rows.append(row)
    return rows, tools, begins


def segments(tokenizer: Tokenizer, record: Record) -> list[Segment]:
    """Return the rendered conversation in pieces of one loss weight; their ids, put together, are `render`'s.

    An assistant's turn has its message's weight, all else 0. Templates leave the thoughts of earlier turns out; such
    a turn is learned as a fast answer, or not at all where the template gives it no form that could be asked for.

    Raises:
        LiaoyuanError: the record has no assistant's turn, or the template does not end turns with an end token.
    """
    rendered = Renderer(tokenizer)(record)
    (parts,) = Encoder(tokenizer)([rendered]).parts()
    return list(zip(parts, rendered.weights, strict=True))


def tokenise(tokenizer: Tokenizer, records: Sequence[Record]) -> list[TokenisedRecord]:
    """Return the tokens and loss weights of what is learned from records; see `segments` and `conversations`."""
    renderer = Renderer(tokenizer)
    rendered = [renderer(part) for record in records for part in conversations(record)]
    return [
        TokenisedRecord(
            tuple(chain.from_iterable(parts)),
            tuple(weight for ids, weight in zip(parts, one.weights, strict=True) for _ in ids),
        )
        for parts, one in zip(Encoder(tokenizer)(rendered).parts(), rendered, strict=True)
    ]


def _weights(pieces: Sequence[Piece], messages: Sequence[Message]) -> list[float]:
    return [0.0 if number is None else messages[number].weight for _, number in pieces]


def _as_form(pieces: Sequence[Piece]) -> Form:
    items: list[str | int] = []
    ends: list[int] = []
    for text, _ in pieces:
        for place, part in enumerate(str(text).split(GUARD)):
            if place % 2:
                items.append(int(part))
            elif part:
                items.append(part)
        ends.append(len(items))
    return Form(items, ends, [number for _, number in pieces])

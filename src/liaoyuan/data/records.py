"""Records: what tuning and evaluation read, one JSON object per line.

A `Record` is a conversation, a prompt with a checkable answer, a preference or a text, with its history (source,
licence). `read_records` and `write_records` are the way in and out; a `.zst` file is compressed. Files in other
layouts come in through `formats`.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import zstandard
from pydantic import BaseModel, Field, ValidationError

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import atomic_file

Kind = Literal["chat", "preference", "unpaired", "prompt", "text"]
Role = Literal["system", "user", "assistant", "tool"]
Made = TypeVar("Made", bound=Config)


class ToolCall(Config):
    """A call of a function that the assistant writes; a tool's answer names it by `id`, if it has one."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    id: str = ""


class Message(Config):
    """One turn. `think` is the assistant's thought before the answer (empty: answered at once); `weight` its loss's.

    tool_calls: what the assistant calls after its content. tool_call_id, name: of the call that a tool answers.
    """

    role: Role
    content: str = ""
    think: str = ""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


class Record(Config):
    """One example.

    kind: "chat" (learn the assistant's turns), "preference" (after `messages`, `chosen` is better than `rejected`),
        "unpaired" (the answer that ends `messages` is good or bad, as `label` says), "prompt" (`messages` ends where
        the model is to answer), "text" (the content of the one message, as it stands).
    tools: what the assistant may call, as OpenAI's API describes it.
    task, answer, level: which verifier checks the answer, the right one, and how hard it is.
    model, score: who wrote the answer, if a model did, and what it was found to be worth.
    split: "train", "validation" or "test", where whoever made the record has decided it.
    """

    id: str
    kind: Kind = "chat"
    messages: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    task: str = ""
    answer: str = ""
    level: int = 0
    model: str = ""
    score: float | None = None
    source: str = ""
    licence: str = ""
    split: str = ""


PLAIN_MESSAGE, PLAIN_CHAT = Message(role="user", content=""), Record(id="", messages=())
SLOTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")  # of a pydantic model
_put_values, _put_given, _put_extra, _put_private = (vars(BaseModel)[slot].__set__ for slot in SLOTS)


def plain_message(role: Role, content: str) -> Message:
    """Return `Message(role=role, content=content)` of values known to be right, in a third of the time.

    Of a million records nearly all messages are such, and checking what has been checked would be half of the work.
    """
    return _like(PLAIN_MESSAGE, role=role, content=content)


def plain_chat(name: str, messages: tuple[Message, ...]) -> Record:
    """Return `Record(id=name, messages=messages)` of values known to be right; see `plain_message`."""
    return _like(PLAIN_CHAT, id=name, messages=messages)


def _like(model: Made, **values: Any) -> Made:
    """Return another model, in which these values, the same that were given there, are other ones."""
    kind = type(model)
    made = kind.__new__(kind)
    _put_values(made, {**vars(model), **values})
    _put_given(made, model.model_fields_set)  # shared: a frozen model never changes it, and a copy has its own
    _put_extra(made, None)
    _put_private(made, None)
    return made


def conversations(record: Record) -> tuple[Record, ...]:
    """Return the conversations that are learned from a record: of a preference the better one, then the worse one.

    Where answers are judged, only what is judged is learned: the assistant's turns before it have the weight 0.

    Raises:
        LiaoyuanError: the record is a prompt, which shows no answer.
    """
    if record.kind == "prompt":
        raise LiaoyuanError(
            f"Record {record.id!r} is a prompt without an answer, so there is nothing to learn from it."
        )
    if record.kind == "preference":
        asked = tuple(_unlearned(message) for message in record.messages)
        sides = (asked + record.chosen, asked + record.rejected)
        return tuple(record.model_copy(update={"messages": side, "chosen": (), "rejected": ()}) for side in sides)
    if record.kind == "unpaired":
        messages = (*(_unlearned(message) for message in record.messages[:-1]), *record.messages[-1:])
        return (record.model_copy(update={"messages": messages}),)
    return (record,)


def _unlearned(message: Message) -> Message:
    return message.model_copy(update={"weight": 0.0}) if message.role == "assistant" else message


def read_records(path: Path) -> list[Record]:
    """Read a `.jsonl` or `.jsonl.zst` file of records; empty lines are left out.

    Raises:
        LiaoyuanError: the file is missing, torn, empty, or a line is no record (the line is named).
    """
    records = [_record(path, number, line) for number, line in read_lines(path) if line.strip()]
    if not records:
        raise LiaoyuanError(f"The file {path} has no records.")
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as `.jsonl`, or compressed if the name ends with `.zst`; the file is whole or absent."""
    with atomic_file(path) as file:
        packer = zstandard.ZstdCompressor().stream_writer(file, closefd=False) if path.suffix == ".zst" else None
        for record in records:
            row = json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"
            (packer or file).write(row.encode())
        if packer:
            packer.close()


def read_lines(path: Path, at: Callable[[int], None] | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file, decompressed if its name ends with `.zst`.

    at: told before each line how many bytes of the file have been read.

    Raises:
        LiaoyuanError: it is missing, unreadable, no UTF-8, or its compression is torn.
    """
    for number, line in read_raw_lines(path, at):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise LiaoyuanError(f"The file {path} is not UTF-8 text.") from error


def read_raw_lines(path: Path, at: Callable[[int], None] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines as bytes, which need not be UTF-8; else as `read_lines`."""
    try:
        with path.open("rb") as raw:
            unpack = zstandard.ZstdDecompressor().stream_reader
            is_packed = path.suffix == ".zst"
            data = io.BufferedReader(unpack(raw, read_across_frames=True)) if is_packed else raw
            place = 0
            for number, line in enumerate(data, start=1):
                if at:
                    place = raw.tell() if is_packed else place + len(line)
                    at(place)
                yield number, line
    except (FileNotFoundError, IsADirectoryError):
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except zstandard.ZstdError as error:
        raise LiaoyuanError(f"The file {path} cannot be decompressed: {error}.") from error
    except OSError as error:
        raise LiaoyuanError(f"The file {path} cannot be read: {error.strerror}.") from error


def _record(path: Path, number: int, line: str) -> Record:
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LiaoyuanError(f"{path}, line {number}: {place + ': ' if place else ''}{first['msg']}.") from error

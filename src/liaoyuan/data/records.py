"""Records: what tuning and evaluation read, one JSON object per line.

A `Record` is a conversation, a prompt with a checkable answer, a preference or a text, with its history (source,
licence). `read_records` and `write_records` are the only way in and out; a `.zst` file is compressed.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import zstandard
from pydantic import ValidationError

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import write_atomic

Kind = Literal["chat", "preference", "unpaired", "prompt", "text"]


class Message(Config):
    """One turn. `think` is the assistant's thought before the answer (empty: answered at once); `weight` its loss's."""

    role: Literal["system", "user", "assistant"]
    content: str
    think: str = ""
    weight: float = 1.0


class Record(Config):
    """One example.

    kind: "chat" (learn the assistant's turns), "preference" (after `messages`, `chosen` is better than `rejected`),
        "unpaired" (the answer that ends `messages` is good or bad, as `label` says), "prompt" (ends with the user),
        "text" (one message whose content is a text).
    task, answer, level: which verifier checks the answer, the right one, and how hard it is.
    """

    id: str
    kind: Kind = "chat"
    messages: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    task: str = ""
    answer: str = ""
    level: int = 0
    source: str = ""
    licence: str = ""


def conversations(record: Record) -> tuple[Record, ...]:
    """Return the conversations that are learned from a record: of a preference the better one, then the worse one.

    Where answers are judged, only what is judged is learned: the assistant's turns before it have the weight 0.
    """
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
    rows = (json.dumps(record.model_dump(exclude_defaults=True), ensure_ascii=False) for record in records)
    data = "".join(row + "\n" for row in rows).encode()
    write_atomic(path, zstandard.compress(data) if path.suffix == ".zst" else data)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file, decompressed if its name ends with `.zst`.

    Raises:
        LiaoyuanError: it is missing, unreadable, no UTF-8, or its compression is torn.
    """
    try:
        with path.open("rb") as raw:
            data = (
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                if path.suffix == ".zst"
                else raw
            )
            yield from enumerate(io.TextIOWrapper(data, encoding="utf-8", newline="\n"), start=1)
    except (FileNotFoundError, IsADirectoryError):
        raise LiaoyuanError(f"The file {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise LiaoyuanError(f"The file {path} is not UTF-8 text.") from error
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

"""Files of examples in the layouts that people have, row by row recognised by their fields and made into records.

`Examples` goes through a file and keeps count: which layouts it has, which rows are bad and why, what was left out.
JSON lines and JSON, compressed if the name ends with `.zst`, and Parquet.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydantic_core
from pydantic import ValidationError

from liaoyuan.data.fields import Fields, RowError, shown
from liaoyuan.data.layouts import CONVERSATIONS, INSTRUCTIONS, LABELLED, PREFERENCES, Layout
from liaoyuan.data.parquet import read_parquet
from liaoyuan.data.problem_layouts import PROBLEMS
from liaoyuan.data.records import Message, Record, read_lines, read_raw_lines
from liaoyuan.errors import LiaoyuanError, nearest

OWN = "record"  # the name of our own layout
LAYOUTS: tuple[Layout, ...] = (*PREFERENCES, *CONVERSATIONS, *LABELLED, *PROBLEMS, *INSTRUCTIONS)
KNOWN = ("messages", "conversations", "instruction and output", "prompt and completion", "prompt, chosen and rejected")
TOLD = 3  # bad lines that an error shows
DECODER = json.JSONDecoder()
EMPTY = object()  # the value of a line without one


@dataclass
class Places:
    """How often something was met, on which line first, and what was there."""

    count: int
    line: int
    found: str = ""


@dataclass
class Tally:
    """What was in a file: rows, records made of them, layouts and kinds, bad rows by what was expected, what was left
    out of good ones.
    """

    rows: int = 0
    records: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    bad: dict[str, Places] = field(default_factory=dict)
    left_out: dict[str, Places] = field(default_factory=dict)

    @property
    def bad_rows(self) -> int:
        return sum(places.count for places in self.bad.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        bad, left_out = ({what: vars(place) for what, place in places.items()} for places in (self.bad, self.left_out))
        counts = {"layouts": dict(self.layouts), "kinds": {kind: n for kind, n in self.kinds.items() if n}}
        return {"rows": self.rows, "records": self.records, **counts, "bad": bad, "left_out": left_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """Return what `to_dict` made JSON of."""
        kinds, layouts = Counter(values["kinds"]), Counter(values["layouts"])
        bad, left_out = (
            {what: Places(**place) for what, place in values[name].items()} for name in ("bad", "left_out")
        )
        return cls(values["rows"], values["records"], layouts, kinds, bad, left_out)

    def note(self, kept: dict[str, Places], what: str, line: int, found: str = "") -> None:
        """Count `what` among the kept."""
        kept.setdefault(what, Places(0, line, found)).count += 1


class Examples:
    """The records of a file, made one after another; `tally` is whole when they have all been.

    line: of the newest record. position: how many bytes of the file have been read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tally = path, Tally()
        self.line = self.position = 0

    def __iter__(self) -> Iterator[Record]:
        self.tally = Tally()
        stem = self.path.name.split(".")[0]
        for line, row in read_rows(self.path, self._at):
            self.line = line
            self.tally.rows += 1
            try:
                yield from self._records(line, row, f"{stem}-{line}")
            except RowError as error:
                self._bad(error)

    def reject(self, record: Record, error: RowError) -> None:
        """Count the record that came last as a bad one."""
        self.tally.records -= 1
        self.tally.kinds[record.kind] -= 1
        self._bad(error)

    def _bad(self, error: RowError) -> None:
        self.tally.note(self.tally.bad, error.expected, self.line, error.found)

    def _at(self, position: int) -> None:
        self.position = position

    def _records(self, line: int, row: Any, place: str) -> list[Record]:
        if isinstance(row, RowError):
            raise row
        layout, records, unused = convert(row, place)
        tally, whole = self.tally, []
        for record in records:
            record, note = _checked(record)
            whole.append(record)
            if note:
                tally.note(tally.left_out, note, line)
        tally.layouts[layout] += 1
        for record in whole:
            tally.kinds[record.kind] += 1
        tally.records += len(whole)
        for name in unused:
            tally.note(tally.left_out, f"field '{name}'", line)
        return whole


def read_examples(path: Path, skip_bad: bool = False) -> tuple[list[Record], Tally]:
    """Return the records of a file in any known layout, and what was in it.

    Raises:
        LiaoyuanError: the file cannot be read, has nothing of use, or has bad rows and `skip_bad` is not set.
    """
    examples = Examples(path)
    records = list(examples)
    check_tally(path, examples.tally, skip_bad)
    return records, examples.tally


def check_tally(path: Path, tally: Tally, skip_bad: bool) -> None:
    """Raise LiaoyuanError if a file gave no record, or has bad rows which the user has not agreed to leave out."""
    if tally.bad and not (skip_bad and tally.records):
        first = "; ".join(describe(tally.bad)[:TOLD])
        raise LiaoyuanError(
            f"{path}: {tally.bad_rows:,} of {tally.rows:,} lines are bad: {first}. "
            f"Mend them, or use --skip-bad to go on with the {tally.records:,} good records "
            "(in a task file: skip_bad = true)."
            if tally.records
            else f"{path} has no usable line of {tally.rows:,}: {first}."
        )
    if not tally.records:
        raise LiaoyuanError(f"The file {path} has no records.")


def describe(bad: dict[str, Places]) -> list[str]:
    """Return a phrase for each kind of bad line, in the order in which they were met."""
    return [
        f"line {places.line}: expected {expected}, found {places.found}"
        + (f" ({places.count:,} such lines)" if places.count > 1 else "")
        for expected, places in sorted(bad.items(), key=lambda item: item[1].line)
    ]


def read_rows(path: Path, at: Callable[[int], None] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each row of a file; of a row that is no JSON the value is its `RowError`.

    at: told before each row how many bytes of the file have been read.

    Raises:
        LiaoyuanError: the file is missing, torn, not UTF-8, or of a kind that is not read.
    """
    if path.suffix == ".parquet":
        yield from read_parquet(path, at)
        return
    if path.name.removesuffix(".zst").endswith(".json"):
        text = "".join(line for _, line in read_lines(path, at))
        if text.lstrip("\ufeff \t\r\n").startswith("["):
            yield from _array(text, path)
            return
    for number, line in read_raw_lines(path, at):
        value = _value(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path)
        if value is not EMPTY:
            yield number, value


def convert(row: Any, place: str) -> tuple[str, list[Record], list[str]]:
    """Return the layout of a row, its records and the names of fields of which nothing was made.

    place: the id of a record whose row has none.

    Raises:
        RowError: the row has no known layout, or a field is not what it should be.
    """
    if not isinstance(row, dict):
        raise RowError("a JSON object", shown(row))
    if "kind" in row or ("id" in row and row.keys() <= Record.model_fields.keys()):
        try:
            return OWN, [Record.model_validate(row)], []
        except ValidationError as error:
            if "kind" in row:
                raise _flaw(error) from None
    layout = _layout_of(frozenset([name for name, value in row.items() if value is not None]))
    if layout is None:
        raise RowError(f"the fields of a known layout ({', '.join(KNOWN)}, text)", _names(row))
    fields = Fields(row)
    try:
        return layout.name, layout.convert(fields, place), fields.unused
    except ValidationError as error:
        raise _flaw(error) from None


@lru_cache(maxsize=256)
def _layout_of(names: frozenset[str]) -> Layout | None:
    """Return the first layout whose fields are among these; the rows of a file mostly have the same."""
    return next((layout for layout in LAYOUTS if names.issuperset(layout.fields)), None)


def flaw_of(record: Record) -> RowError | None:
    """Return why nothing can be learned from a record or asked by it, or None."""
    if not record.messages:
        return RowError("messages", "none")
    last = record.messages[-1]
    if record.kind == "preference":
        return _flaw_of_sides(record)
    if record.kind == "text":
        return None if last.content.strip() else RowError("a text", "an empty one")
    if record.kind == "prompt":
        return RowError("a prompt that ends with the user's turn", "an answer") if last.role == "assistant" else None
    if last.role != "assistant":
        return RowError("a message of the assistant at the end", f"one of role '{last.role}'")
    if record.kind == "unpaired" and record.label is None:
        return RowError("true or false in 'label'", "none")
    return RowError("an answer", "an empty one") if any(map(_is_empty, record.messages)) else None


def _checked(record: Record) -> tuple[Record, str]:
    """Return the record without turns after its last answer, and what to say of that; raise RowError if useless."""
    note = ""
    if record.kind == "chat" and record.messages and record.messages[-1].role != "assistant":
        answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        if answers:
            record = record.model_copy(update={"messages": record.messages[: answers[-1] + 1]})
            note = "turns after the last answer"
    flaw = flaw_of(record)
    if flaw:
        raise flaw
    return record, note


def _flaw_of_sides(record: Record) -> RowError | None:
    for name, side in (("chosen", record.chosen), ("rejected", record.rejected)):
        if not side or side[-1].role != "assistant" or _is_empty(side[-1]):
            return RowError(f"an answer at the end of '{name}'", "none")
    if record.chosen == record.rejected:
        return RowError("two different answers", "the same one twice")
    return None


def _is_empty(message: Message) -> bool:
    if message.role != "assistant" or message.weight == 0:
        return False
    return not (message.tool_calls or message.content.strip() or message.think.strip())


def _value(line: bytes, path: Path) -> Any:
    """Return the value of a line; of one that is no JSON its `RowError`, of one without anything in it `EMPTY`."""
    try:
        return pydantic_core.from_json(line)
    except ValueError as error:
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise LiaoyuanError(f"The file {path} is not UTF-8 text.") from error
        return RowError("JSON", f"{shown(text)} ({error})") if text else EMPTY


def _array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each item of a JSON array."""
    place = text.index("[") + 1
    line = 1 + text.count("\n", 0, place)
    while True:
        begin = _after_spaces(text, place)
        line += text.count("\n", place, begin)
        if text.startswith("]", begin):
            return
        try:
            place = DECODER.raw_decode(text, begin)[1]
        except (ValueError, RecursionError) as error:
            yield line, RowError("a JSON array of objects", f"{shown(text[begin : begin + 80].strip())} ({error})")
            return  # nobody knows where the next item begins
        yield line, _value(text[begin:place].encode(), path)
        line += text.count("\n", begin, place)
        place = _after_spaces(text, place)
        if text.startswith(",", place):
            place += 1


def _after_spaces(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _flaw(error: ValidationError) -> RowError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = Message.model_fields if "messages" in first["loc"] else Record.model_fields
        return RowError("fields of a record", f"'{place}'" + nearest(str(first["loc"][-1]), fields).rstrip("?"))
    return RowError(f"{_without_numbers(place)}: {first['msg']}", shown(first["input"]))


def _without_numbers(place: str) -> str:
    return ".".join(part for part in place.split(".") if not part.isdigit())


def _names(row: dict[str, Any]) -> str:
    names = ", ".join(f"'{name}'" for name in row) or "none"
    known = [name for layout in LAYOUTS for name in layout.fields]
    hints = [nearest(name, known) for name in row if name not in known]
    return names + next((hint.rstrip("?") for hint in hints if hint), "")

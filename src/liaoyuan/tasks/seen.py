"""What a model was trained on, as a set of hashes of problems: a test problem among them measures nothing.

Two texts that differ in spaces, in capitals or in the width of their characters have one hash. A run writes
`trained_on.bin` in its folder before it learns from a problem, and the model that comes out of it has one as well,
with what the model it began from had learned.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from liaoyuan.data import Record
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import disk_errors, write_atomic
from liaoyuan.tasks.problem import Problem, half_width

NAME = "trained_on.bin"
HEADER = b"seen-v1\n"  # as long as a hash, so that the file is a row of eights
SIZE = 8  # bytes of a hash: among a million problems two of one hash are met in 1 of 37 million sets
SPACES = re.compile(r"\s+")
# A space counts only between two letters or digits of a script that has spaces: "3 + 4" is "3+4", "3 5" is not "35".
IDLE_SPACE = re.compile(r" (?:(?<=[\W_] )|(?![^\W_])|(?<=[\u3000-\u9fff] )|(?=[\u3000-\u9fff]))")

Marks = np.ndarray  # uint64, sorted, each once


def normalised(text: str) -> str:
    """Return the text in the one form that it shares with its near duplicates."""
    return IDLE_SPACE.sub("", SPACES.sub(" ", half_width(text).casefold()).strip())


def mark(text: str) -> int:
    """Return the hash of a text's content."""
    digest = hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()
    return int.from_bytes(digest, "little")


def marks_of(problem: Problem) -> tuple[int, int]:
    """Return the hashes by which a problem is known again: of its content, whatever the wording, and of its words."""
    return mark(problem.key), mark(problem.question)


def marks_of_record(record: Record) -> tuple[int, ...]:
    """Return the hashes of what a record teaches answers to: of each of the user's turns, and of a task's problem.

    A turn is known by its words, and as a question of a task from a file, which may add instructions to it. The `id`
    of a task's record is the key of its problem, perhaps with how it is told behind a slash (`to_record`).
    """
    turns = [message.content for message in record.messages if message.role == "user"]
    said = tuple(mark(turn) for turn in turns)
    key, _, told = record.id.rpartition("/")
    return (*said, mark(key if told.startswith(("slow", "fast")) else record.id)) if record.task else said


def read_seen(folder: Path) -> Marks:
    """Return what the run or model in `folder` was trained on; nothing where no file says so. A torn end is left out.

    Raises:
        LiaoyuanError: the file is something else.
    """
    path = folder / NAME
    data = path.read_bytes() if path.exists() else HEADER
    if data and not data.startswith(HEADER):
        raise LiaoyuanError(f"{path} is no list of what a model was trained on: delete it, or copy it again.")
    return np.unique(np.frombuffer(data[: len(data) // SIZE * SIZE], "<u8")[1:])


def write_seen(folder: Path, marks: Marks) -> None:
    """Write the whole set; the file is whole or absent."""
    write_atomic(folder / NAME, HEADER + marks.astype("<u8").tobytes())


class Seen:
    """What a run has been trained on so far; `add` is to be called before a step learns from its problems.

    Nothing is ever taken out: a step that is repeated after a stop adds what is there already.
    """

    def __init__(self, folder: Path, start: Path | None = None) -> None:
        """Go on with the file in `folder`, where a torn end is cut off, and with what the model `start` has learned."""
        found = read_seen(folder)
        self.marks = np.union1d(found, read_seen(start)) if start else found
        write_seen(folder, self.marks)
        self._path = folder / NAME

    def add(self, problems: Iterable[Problem]) -> None:
        """Append the problems that are new; they are on the disk when this returns."""
        self._append(one for problem in problems for one in marks_of(problem))

    def add_records(self, records: Iterable[Record]) -> None:
        """Append what records teach answers to."""
        self._append(one for record in records for one in marks_of_record(record))

    def _append(self, marks: Iterable[int]) -> None:
        new = np.setdiff1d(np.fromiter(marks, np.uint64), self.marks)
        if not len(new):
            return
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(new.astype("<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.marks = np.union1d(self.marks, new)


def seen_among(problems: Sequence[Problem], marks: Marks) -> list[Problem]:
    """Return the problems of which the content or the words are among `marks`."""
    asked = np.array([marks_of(problem) for problem in problems], np.uint64).reshape(-1, 2)
    known: np.ndarray = np.isin(asked, marks)
    return [problem for problem, row in zip(problems, known.tolist(), strict=True) if any(row)]


def refuse_seen(folder: Path, problems: Sequence[Problem], allow: bool = False) -> int:
    """Return how many of the problems the model in `folder` was trained on.

    Raises:
        LiaoyuanError: there are some and `allow` is false.
    """
    found = seen_among(problems, read_seen(folder))
    if found and not allow:
        raise LiaoyuanError(
            f"{folder} was trained on {len(found)} of these {len(problems)} problems, such as {found[0].question!r}: "
            "what it knows by heart says nothing of what it can do. Choose other problems, or --seen to measure anyway."
        )
    return len(found)

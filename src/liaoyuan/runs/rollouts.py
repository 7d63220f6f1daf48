"""The rollouts of a run of reinforcement learning: a file a step, `rollouts/000012.jsonl.zst`, a line a rollout.

A line is `{"step", "group", "sample", "problem", "task", "level", "question", "gold", "thought", "text", "flaw",
"reward", "parsed", "reason", "tokens", "advantage"}`. Whoever wrote it may have erred: what is missing is empty, what
is no rollout is counted, and a step that unpacks to too much is read up to there.
"""

import io
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import zstandard

from liaoyuan.runs.folder import Folder
from liaoyuan.runs.text import as_text

FOLDER = "rollouts"
NAME = re.compile(r"(\d{6,12})\.jsonl\.zst")
MOST_BYTES = 2**27  # that a step may unpack to
MOST_ROLLOUTS = 50_000  # of a step
CHOICE = 200  # characters by which tasks and flaws are told apart
LONGEST_LINE = 2**25
WINDOW = 2**27  # bytes that unpacking may keep at hand, zstandard's own default for what is sent by others
KEPT_STEPS, KEPT_BYTES = 16, 2**26  # that `Steps` keeps unpacked
Verdict = Literal["right", "partly", "wrong", "unjudged"]
LONG_TEXTS = ("question", "gold", "thought", "text", "parsed", "reason")


@dataclass(frozen=True)
class Shown:
    """A rollout, its texts safe to show. reward None: it could not be judged; advantage None: it taught nothing."""

    step: int
    group: int
    sample: int
    problem: str
    task: str
    level: int | None
    question: str
    gold: str
    thought: str
    text: str
    flaw: str
    reward: float | None
    parsed: str | None
    reason: str
    tokens: int | None
    advantage: float | None

    @property
    def verdict(self) -> Verdict:
        if self.reward is None:
            return "unjudged"
        return "right" if self.reward >= 1 else "wrong" if self.reward <= 0 else "partly"


@dataclass(frozen=True)
class Step:
    """The rollouts of a step, sorted by group and sample; unread: lines that are none; whole: whether all was read."""

    rollouts: tuple[Shown, ...]
    unread: int = 0
    whole: bool = True
    bytes: int = 0


@dataclass(frozen=True)
class Filter:
    """Which rollouts are wanted; what is empty does not matter. words: that a text of it holds, in any case."""

    verdict: str = ""
    level: int | None = None
    task: str = ""
    flaw: str = ""  # "any": a flawed one; "none": a whole one
    words: str = ""

    def __call__(self, one: Shown) -> bool:
        flawed = {"": True, "any": bool(one.flaw), "none": not one.flaw}.get(self.flaw, one.flaw[:CHOICE] == self.flaw)
        return (
            flawed
            and self.verdict in ("", one.verdict)
            and self.level in (None, one.level)
            and self.task in ("", one.task[:CHOICE])
            and (not self.words or self._has_words(one))
        )

    def _has_words(self, one: Shown) -> bool:
        wanted = self.words.lower()
        return any(wanted in str(getattr(one, name) or "").lower() for name in (*LONG_TEXTS, "flaw", "problem"))


class Steps:
    """The steps of a run; the last ones that were asked for are kept unpacked."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder.below(FOLDER)
        self._kept: OrderedDict[tuple[int, int, int], Step] = OrderedDict()

    def numbers(self) -> list[int]:
        """Return the steps of which there are rollouts, in order."""
        return sorted(int(match[1]) for name in self._folder.names() if (match := NAME.fullmatch(name)))

    def read(self, number: int) -> Step:
        """Return a step's rollouts. Raises Absent if there is no such step (any more)."""
        name = f"{number:06d}.jsonl.zst"
        found = self._folder.status(name)
        key = (number, found.st_mtime_ns, found.st_size) if found else (number, 0, 0)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with self._folder.open(name) as file:
            step = read_step(file, number)
        self._kept[key] = step
        while len(self._kept) > KEPT_STEPS or sum(each.bytes for each in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return step


def read_step(file: BinaryIO, number: int) -> Step:
    """Return the rollouts of a step's file; a torn or damaged one gives those before the damage."""
    rollouts, unread, budget = [], 0, _Budget()
    for line in _lines(file, budget):
        one = _rollout(line, number)
        unread += one is None
        rollouts += [one] if one else []
        if len(rollouts) >= MOST_ROLLOUTS:
            budget.whole = False
            break
    rollouts.sort(key=lambda each: (each.group, each.sample))
    return Step(tuple(rollouts), unread, budget.whole, budget.bytes)


@dataclass
class _Budget:
    bytes: int = 0
    whole: bool = True


def _lines(file: BinaryIO, budget: _Budget) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(file, read_across_frames=True)
    lines = io.BufferedReader(reader, 2**16)
    try:
        while line := lines.readline(LONGEST_LINE):
            budget.bytes += len(line)
            if budget.bytes > MOST_BYTES:
                budget.whole = False
                return
            yield line
    except zstandard.ZstdError:
        budget.whole = False


def _rollout(line: bytes, step: int) -> Shown | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    whole = {name: _whole(row.get(name)) for name in ("group", "sample", "level", "tokens")}
    return Shown(
        step=step,
        group=whole["group"] or 0,
        sample=whole["sample"] or 0,
        level=whole["level"],
        tokens=whole["tokens"],
        reward=_number(row.get("reward")),
        advantage=_number(row.get("advantage")),
        parsed=None if row.get("parsed") is None else as_text(row["parsed"]),
        **{
            name: as_text(row.get(name))
            for name in ("problem", "task", "question", "gold", "thought", "text", "flaw", "reason")
        },
    )


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or abs(number) > 2**53 else int(number)


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def groups_of(rollouts: Iterable[Shown]) -> list[list[Shown]]:
    """Return the rollouts of each group together, in the order of their groups."""
    found: dict[int, list[Shown]] = {}
    for one in rollouts:
        found.setdefault(one.group, []).append(one)
    return list(found.values())


def shortened(one: Shown, most: int) -> tuple[Shown, dict[str, int]]:
    """Return a rollout whose texts have at most `most` characters, and the whole length of those that had more."""
    texts = {name: getattr(one, name) or "" for name in (*LONG_TEXTS, "flaw", "task", "problem")}
    long = {name: len(text) for name, text in texts.items() if len(text) > most}
    shorter: dict[str, Any] = {name: texts[name][:most] for name in long}
    return (replace(one, **shorter), long) if long else (one, {})

"""Rejection sampling: which of a model's answers are kept to be learned, and why the others are not.

Fine-tuning on what is kept is expert iteration (Yuan et al. 2023, arXiv 2308.01825, sec. 3.3): on a model's own right
answers, or on those of a better one.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from liaoyuan.data import Message, Record

Fate = Literal["kept", "not judged", "not whole", "too low", "the same", "beyond the best"]
FATES: tuple[Fate, ...] = ("kept", "not judged", "not whole", "too low", "the same", "beyond the best")


@dataclass(frozen=True)
class Rule:
    """What is kept of the answers to one problem: those that are worth at least `least` (None: whatever they are
    worth), of which the best `most` (0: all), each different one once.
    """

    least: float | None = 1.0
    most: int = 0


@dataclass(frozen=True)
class Answer:
    """What decides on an answer: what it is worth (None: that could not be said), and why it is not whole, if so."""

    content: Hashable
    value: float | None
    flaw: str = ""


def sift(answers: Sequence[Answer], rule: Rule) -> list[Fate]:
    """Return what becomes of each answer to one problem; among equals the earlier one is the better."""
    fates, seen, good = list[Fate](), set[Hashable](), list[int]()
    for place, one in enumerate(answers):
        fate = _fate(one, rule, seen)
        fates.append(fate)
        if fate == "kept":
            seen.add(one.content)
            good.append(place)
    if rule.most:
        for place in sorted(good, key=lambda place: -(answers[place].value or 0.0))[rule.most :]:
            fates[place] = "beyond the best"
    return fates


def _fate(one: Answer, rule: Rule, seen: set[Hashable]) -> Fate:
    if one.flaw:
        return "not whole"
    if one.value is None:
        return "not judged"
    if rule.least is not None and one.value < rule.least:
        return "too low"
    return "the same" if one.content in seen else "kept"


@dataclass(frozen=True)
class Harvest:
    """The records that are kept, and for each level how many problems, how many of them with an answer that is kept,
    and how many answers there are of each fate.
    """

    records: list[Record]
    levels: dict[int, dict[str, int]]


def harvest(rows: Iterable[Mapping[str, Any]], rule: Rule, model: str) -> Harvest:
    """Sift rows of `rollout_log`, those of one problem together; model: the name of who answered."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    records, counts = list[Record](), dict[int, Counter[str]]()
    for group in groups.values():
        answers = [Answer((row["thought"], row["text"]), row["reward"], row["flaw"]) for row in group]
        fates = sift(answers, rule)
        kept = [row for row, fate in zip(group, fates, strict=True) if fate == "kept"]
        records += _records(kept, model)
        counts.setdefault(group[0]["level"], Counter()).update(["problems", *(["solved"] if kept else []), *fates])
    columns = ("problems", "solved", *FATES)
    return Harvest(records, {level: {name: counts[level][name] for name in columns} for level in sorted(counts)})


def _records(rows: Sequence[Mapping[str, Any]], model: str) -> Iterator[Record]:
    """Yield a conversation of each row; the ids are known as the problem's, see `tasks.seen`."""
    for number, row in enumerate(rows):
        answer = Message(role="assistant", content=row["text"], think=row["thought"])
        yield Record(
            id=f"{row['problem']}/{'slow' if row['thought'] else 'fast'}-{number}",
            messages=(Message(role="user", content=row["question"]), answer),
            task=row["task"],
            answer=row["gold"],
            level=row["level"],
            source=f"answers of {model}",
            model=model,
            score=row["reward"],
        )

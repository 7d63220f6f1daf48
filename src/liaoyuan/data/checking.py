"""What is in a file of examples: layouts, bad lines, duplicates, and, to a model's tokenizer, lengths and masks."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liaoyuan.data.chat import Renderer
from liaoyuan.data.formats import Examples, Tally
from liaoyuan.data.record_cache import KINDS, TokenisedFile, tokenise_file
from liaoyuan.data.records import Record, conversations
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Progress, Report, silent

PERCENTILES = (50, 90, 99)
HASH_BYTES = 8  # among a million records two different ones of one hash are met in 1 of 37 million files
UNKNOWN = "unknown"
Shown = list[tuple[str, float]]  # an example as text in pieces, each with its loss weight


@dataclass
class Contents:
    """What was found. duplicates: records that say what an earlier one says; first_duplicate: the first, and that one.

    turns, thoughts: of the assistant, that have a weight; unlearned, unshown: of these, what the template leaves out.
    tokens: what `--model` adds (empty without it, or where nothing can be learned: `reason` says why).
    """

    tally: Tally
    duplicates: int = 0
    first_duplicate: tuple[int, int] | None = None
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    characters: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    thoughts: int = 0
    unlearned: int = 0
    unshown: int = 0
    tokens: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    example: Shown = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        values = {name: value for name, value in vars(self).items() if name not in ("tally", "example")}
        return {**self.tally.to_dict(), **values, "example": [list(piece) for piece in self.example]}


def check(path: Path, tokenizer: Tokenizer | None = None, report: Report = silent) -> Contents:
    """Go through a file of examples; with a tokenizer, through its tokens too, which are kept for the training.

    Raises:
        LiaoyuanError: the file cannot be read.
    """
    examples = Examples(path)
    found = Contents(examples.tally)
    renderer = Renderer(tokenizer) if tokenizer and tokenizer.has_template else None
    said, lines, sizes = array("Q"), array("q"), array("q")  # 24 bytes a record, whatever is in it
    total = max(1, path.stat().st_size // 1000) if path.exists() else 1
    for number, record in enumerate(examples):
        said.append(_count(found, record))
        lines.append(examples.line)
        sizes.append(sum(len(message.content) + len(message.think) for message in _all(record)))
        if renderer and record.kind != "prompt":
            _look(found, record, renderer)
        if number % 1000 == 0:
            report(Progress(min(examples.position // 1000, total), total, "kB", f"reading, {number:,} records"))
    found.tally = examples.tally
    found.duplicates, found.first_duplicate = duplicates(np.array(said), np.array(lines))
    found.characters = percentiles(np.array(sizes)) if sizes else {}
    if tokenizer and found.tally.records:
        try:
            made = tokenise_file(path, tokenizer, KINDS, True, report)
            found.tokens = _of_tokens(made)
        except LiaoyuanError as error:
            found.reason = str(error)
    return found


def percentiles(values: np.ndarray) -> dict[str, int]:
    """Return least, percentiles and most of integers."""
    rows = {f"p{share}": int(np.percentile(values, share, method="higher")) for share in PERCENTILES}
    return {"min": int(values.min()), **rows, "max": int(values.max())}


def duplicates(said: np.ndarray, lines: np.ndarray) -> tuple[int, tuple[int, int] | None]:
    """Return how many records say what an earlier one says; and the lines of the first such record, and of that one.

    said: uint64 [R], hashes of what the records say. lines: int64 [R], where they stand.
    """
    order = np.argsort(said, kind="stable")
    is_begin = np.diff(said[order], prepend=0) != 0
    is_begin[:1] = True
    earliest = order[np.maximum.accumulate(np.where(is_begin, np.arange(len(order)), 0))]
    is_repeated = lines[order] != lines[earliest]
    if not is_repeated.any():
        return 0, None
    first = np.flatnonzero(is_repeated)[order[is_repeated].argmin()]
    return int(is_repeated.sum()), (int(lines[order[first]]), int(lines[earliest[first]]))


def _count(found: Contents, record: Record) -> int:
    """Count where a record comes from, and return a hash of what it says."""
    told = record.model_dump_json(include={"messages", "chosen", "rejected", "label", "tools"})
    found.sources[record.source or UNKNOWN] += 1
    found.licences[record.licence or UNKNOWN] += 1
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=HASH_BYTES).digest(), "little")


def _look(found: Contents, record: Record, renderer: Renderer) -> None:
    """Count what the template leaves out of a record, and keep the first one as the example."""
    for part in conversations(record):
        try:
            rendered = renderer(part)
        except LiaoyuanError:
            continue  # told with the tokens
        pieces = list(zip(rendered.shown(), rendered.weights, strict=True))
        said = "".join(text for text, weight in pieces if weight)
        own = [message for message in part.messages if message.role == "assistant" and message.weight]
        found.turns += len(own)
        found.unlearned += max(0, len(own) - sum(weight > 0 for weight in rendered.weights))
        thoughts = [message.think.strip() for message in own if message.think.strip()]
        found.thoughts += len(thoughts)
        found.unshown += sum(thought not in said for thought in thoughts)
        found.example = found.example or pieces


def _of_tokens(made: TokenisedFile) -> dict[str, Any]:
    sizes, learned = made.records.sizes, made.records.learned()
    longest = int(sizes.argmax())
    refused = {what: vars(place) for what, place in made.tally.bad.items()}
    return {
        "tokens": int(sizes.sum()),
        "learned": int(learned.sum()),
        "learned_share": float(learned.sum() / max(1, sizes.sum())),
        "lengths": percentiles(sizes),
        "longest": {"tokens": int(sizes[longest]), "line": int(made.lines[longest])},
        "nothing_learned": int((learned == 0).sum()),
        "bad": refused,
    }


def _all(record: Record) -> tuple[Any, ...]:
    return (*record.messages, *record.chosen, *record.rejected)

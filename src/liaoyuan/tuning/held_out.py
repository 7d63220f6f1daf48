"""A part of the data that is never trained on, and what a model makes of it before and after.

Records are told apart by what they ask, not by their names: those that ask the same stand on one side.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from liaoyuan.data import Batch, FileRecords, Record, TokenisedRecord
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import Interval, ratio
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import read_json, write_json
from liaoyuan.tasks.seen import normalised

HELD_OUT = "held_out.jsonl.zst"  # the records in a run folder that were never trained on
DATA = "data.json"  # in a run folder: what tells its training data from others
PASS_TOKENS = 4096  # at least a record, of one pass
Records = TypeVar("Records", list[Record], FileRecords)  # in memory, or in their file


def content_hash(record: Record) -> str:
    """Return 32 hexadecimal digits that follow from what a record asks, in any spacing and capitals, or from the whole
    of one that asks nothing: a question that is answered in two ways, slowly and fast, has one hash.
    """
    asked = [message for message in record.messages if message.role != "assistant"]
    answers = (*record.messages, *record.chosen, *record.rejected)
    rows = [[message.role, normalised(message.content)] for message in asked or answers]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Split(Generic[Records]):
    """Records to learn from and records that are held out; `dropped`: how many were left out, being held out too."""

    train: Records
    held_out: Records
    dropped: int = 0


def split(records: Records, share: float, most: int) -> Split[Records]:
    """Hold out this share of what is asked, rounded, and at most so many questions, with all their answers; the hash
    chooses. Of few records that is none.
    """
    hashes = _hashes(records)
    different = np.unique(hashes)
    count = min(most, round(share * len(different)))
    is_held = np.isin(hashes, different[:count])
    held = _different(_at(records, np.flatnonzero(is_held)))
    train = _at(records, np.flatnonzero(~is_held))
    return Split(train, held, len(records) - len(train) - len(held))


def split_off(records: Records, held_out: Records, most: int) -> Split[Records]:
    """Hold out given records, at most so many; whatever asks the same is left out of what is learned.

    Raises:
        LiaoyuanError: nothing would be left to learn from.
    """
    train = _at(records, np.flatnonzero(~np.isin(_hashes(records), _hashes(held_out))))
    if not len(train):
        raise LiaoyuanError("Every record to learn is held out too: there is nothing to learn from.")
    return Split(train, _different(held_out, most), len(records) - len(train))


def _hashes(records: Sequence[Record]) -> np.ndarray:
    """Return the content hash of each record, bytes of 32 characters [R]."""
    return np.fromiter((content_hash(record).encode() for record in records), "S32", len(records))


def _at(records: Records, places: np.ndarray) -> Records:
    if isinstance(records, FileRecords):
        return records.at(places)
    return [records[place] for place in places.tolist()]


def _different(records: Records, most: int | None = None) -> Records:
    """Return the records without those that say the same as an earlier one, at most so many."""
    found: dict[Any, int] = {}
    for place, one in enumerate(records):
        if len(found) == most:
            break
        found.setdefault((one.messages, one.chosen, one.rejected), place)
    return _at(records, np.array([*found.values()], dtype=np.int64))


def refuse_other_data(folder: Path, records: Sequence[TokenisedRecord], has_begun: bool) -> None:
    """Note what a run learns from in its folder.

    Raises:
        LiaoyuanError: a run on other data has begun there.
    """
    state = hashlib.blake2b(digest_size=16)
    for record in records:
        state.update(np.array(record.tokens, dtype=np.int64).tobytes() + np.array(record.weights).tobytes())
    path, found = folder / DATA, {"records": len(records), "tokens_blake2b": state.hexdigest()}
    if has_begun and path.exists() and read_json(path) != found:
        raise LiaoyuanError(
            f"{folder} holds a run on other data: the records or the tokenizer have changed. Give the same, or choose "
            "another folder."
        )
    write_json(path, found)


@dataclass(frozen=True)
class Outcomes:
    """Of each held-out record, float64 [R]: the cost of its learned tokens in nats, their number (each by its weight),
    and how many of them the model found most probable.
    """

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray

    @property
    def loss(self) -> float:
        """The mean cost of a token, in nats."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """The share of tokens that the model found most probable."""
        return float(self.right.sum() / self.tokens.sum())

    def to_dict(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "Outcomes":
        return cls(**{name: np.array(row) for name, row in values.items()})


def measure(program: Program, records: Sequence[TokenisedRecord], world: World) -> Outcomes:
    """Return what the model makes of the records. Every process makes the call; the records are dealt out to them.

    Raises:
        LiaoyuanError: no token of the records is learned.
    """
    groups = _groups(records)
    turns = -(-len(groups) // world.data_size)
    found = torch.zeros(3, len(records), dtype=torch.float64, device=program.device)
    for turn in range(turns):
        place = turn * world.data_size + world.data_rank
        group = groups[min(place, len(groups) - 1)]  # all processes take as many turns: a layer's weights are shared
        rows = _outcomes(program, [records[n] for n in group])
        if place < len(groups) and world.counts:
            found[:, group] = rows.to(found)
    nats, tokens, right = world.sum(found.to(world.device.torch)).cpu().numpy()
    if not tokens.sum():
        raise LiaoyuanError("No token of the held-out records is one that the assistant wrote.")
    return Outcomes(nats, tokens, right)


def _groups(records: Sequence[TokenisedRecord]) -> list[list[int]]:
    """Put records of like length together into passes of about `PASS_TOKENS` tokens."""
    groups: list[list[int]] = [[]]
    size = 0
    for place in sorted(range(len(records)), key=lambda n: len(records[n].tokens)):
        length = len(records[place].tokens) - 1
        if groups[-1] and size + length > PASS_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += length
    return groups


def _outcomes(program: Program, records: Sequence[TokenisedRecord]) -> torch.Tensor:
    """Return nats, tokens and right ones of each record, fp64 [3, R], from one pass."""
    lengths = torch.tensor([len(record.tokens) - 1 for record in records])
    tokens = torch.cat([torch.tensor(record.tokens) for record in records])
    last = torch.cumsum(lengths + 1, 0) - 1
    is_read = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, last, False)
    is_target = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, last - lengths, False)
    weights = torch.cat([torch.tensor(record.weights) for record in records])[is_target]
    batch = Batch(
        tokens=tokens[is_read],
        positions=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        targets=tokens[is_target],
        weights=weights,
        boundaries=torch.cat([torch.zeros(1), torch.cumsum(lengths, 0)]).to(torch.int32),
    )
    log_probs, first = (values.cpu().double() for values in program.predictions(batch))
    owner = torch.repeat_interleave(torch.arange(len(records)), lengths)
    rows = torch.stack([-log_probs * weights, weights.double(), first * weights])
    return torch.zeros(3, len(records), dtype=torch.float64).index_add(1, owner, rows)


def compare(before: Outcomes, after: Outcomes) -> dict[str, Any]:
    """Return loss, perplexity and token accuracy of both on the same records, with 95% intervals over the records."""
    loss = {
        "before": ratio(before.nats, before.tokens),
        "after": ratio(after.nats, after.tokens),
        "difference": ratio(after.nats - before.nats, after.tokens),
    }
    accuracy = {
        "before": ratio(before.right, before.tokens),
        "after": ratio(after.right, after.tokens),
        "difference": ratio(after.right - before.right, after.tokens),
    }
    perplexity = {name: _exponential(loss[name]) for name in ("before", "after")}
    figures = {"loss": loss, "perplexity": perplexity, "token_accuracy": accuracy}
    plain = {name: {when: one.to_dict() for when, one in values.items()} for name, values in figures.items()}
    return {"records": len(before.tokens), "tokens": round(float(before.tokens.sum())), **plain}


def _exponential(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(value, 700.0)) for value in (interval.mean, interval.low, interval.high)))

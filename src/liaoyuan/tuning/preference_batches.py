"""Answers that are judged, packed for training: the two answers of a pair lie one after the other in one row.

A batch is a function of (seed, step) alone, as all batches are, and a pair never falls apart over processes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liaoyuan.data import Batch, Record, RecordBatches, TokenisedRecord, Tokenizer, tokenise
from liaoyuan.errors import LiaoyuanError


@dataclass(frozen=True)
class Judged:
    """What is judged together: the better and the worse answer to a prompt, or one answer that is liked or not.

    record: what says so. answers: whole conversations; their weights are above 0 for what is judged alone. liked: of
    each answer.
    """

    record: Record
    answers: tuple[TokenisedRecord, ...]
    liked: tuple[bool, ...]

    @property
    def size(self) -> int:
        """Tokens that it takes in a row."""
        return sum(len(answer.tokens) - 1 for answer in self.answers)

    @property
    def key(self) -> bytes:
        """Identifies the prompt, by its content: whatever is said about one prompt falls on one side of a split."""
        tokens = prompt_of(self.answers[0])
        return hashlib.blake2b(",".join(map(str, tokens)).encode(), digest_size=8).digest()


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(Batch):
    """A `Batch` whose documents are judged answers, A of them; of a pair the better one comes first.

    documents: int64 [A], which document each answer is. liked: bool [A].
    reference: fp32 [A], the sum of its tokens' log-probabilities, by weight, under the model to begin with.
    strangers: answers to other prompts, packed, and the sum of theirs; see `strangers`.
    """

    documents: Tensor
    liked: Tensor
    reference: Tensor
    strangers: Batch | None = None
    strangers_reference: float = 0.0
    strangers_count: int = 0


def judge(tokenizer: Tokenizer, records: Sequence[Record], paired: bool, mark: int | None = None) -> list[Judged]:
    """Return the judged answers of records of the kind "preference", or also "unpaired" if not `paired`.

    mark: the token after a whole conversation whose probability is its reward; it alone is learned then.

    Raises:
        LiaoyuanError: a record is of another kind, has no label, or nothing of an answer would be learned.
    """
    allowed = ("preference",) if paired else ("preference", "unpaired")
    for record in records:
        if record.kind not in allowed:
            raise LiaoyuanError(
                f"Record {record.id!r} is of the kind '{record.kind}', but this loss learns from "
                f"{' and '.join(allowed)}: an answer that was chosen and one that was rejected after the same messages."
            )
        if record.kind == "unpaired" and record.label is None:
            raise LiaoyuanError(f"Record {record.id!r} has no label (true or false), so its answer is not judged.")
    tokenised, found = iter(tokenise(tokenizer, records)), []
    for record in records:
        liked = (True, False) if record.kind == "preference" else (bool(record.label),)
        answers = tuple(_marked(next(tokenised), mark) for _ in liked)
        if not all(any(weight > 0 for weight in answer.weights) for answer in answers):
            raise LiaoyuanError(f"Record {record.id!r} has an answer of no weight, so nothing of it would be learned.")
        found.append(Judged(record, answers, liked))
    return found


def _marked(answer: TokenisedRecord, mark: int | None) -> TokenisedRecord:
    if mark is None:
        return TokenisedRecord(tuple(answer.tokens), tuple(answer.weights))
    return TokenisedRecord((*answer.tokens, mark), (0.0,) * len(answer.tokens) + (1.0,))


def prompt_of(answer: TokenisedRecord) -> tuple[int, ...]:
    """Return the tokens before the first one that is learned."""
    first = next(place for place, weight in enumerate(answer.weights) if weight > 0)
    return tuple(answer.tokens[:first])


def fitting(items: Sequence[Judged], length: int, skip: bool) -> list[Judged]:
    """Return the items that fit in a row of `length` tokens; the others are left out if `skip`, else refused."""
    kept = [item for item in items if item.size <= length]
    if len(kept) < len(items) and not skip:
        long = next(item for item in items if item.size > length)
        raise LiaoyuanError(
            f"{len(items) - len(kept)} records do not fit in a row, the first is {long.record.id!r}: with its prompt "
            f"it has {long.size} tokens, both answers together if it has two, more than sequence_length ({length}). "
            "Raise sequence_length, or leave them out with skip_long = true."
        )
    return kept


def split(items: Sequence[Judged], share: float) -> tuple[list[Judged], list[Judged]]:
    """Return the items to train on, and those that are held out: about `share` of the prompts, by their content."""
    held = [int.from_bytes(item.key, "big") / 2**64 < share for item in items]
    parts = [[item for item, out in zip(items, held, strict=True) if out is wanted] for wanted in (False, True)]
    if not all(parts):
        raise LiaoyuanError(
            f"Of {len(items)} records, held_out_share = {share} leaves {len(parts[0])} to learn from and "
            f"{len(parts[1])} to measure on: give more records, or others to measure on (--held-out)."
        )
    return parts[0], parts[1]


def liked_conversations(items: Sequence[Judged]) -> list[Record]:
    """Return the records as conversations that end with the answer that is liked; those without one are left out."""
    found = []
    for record in (item.record for item in items if any(item.liked)):
        messages = (*record.messages, *record.chosen)
        plain = {"kind": "chat", "messages": messages, "chosen": (), "rejected": (), "label": None}
        found.append(record.model_copy(update=plain))
    return found


def strangers(items: Sequence[Judged], length: int) -> list[TokenisedRecord]:
    """Return for each item its prompt with an answer of the next one, cut to `length`: what the policy has no reason
    to say, from which KTO estimates how far it has gone from the reference (arXiv 2402.01306, sec. 4.1).
    """
    found = []
    for place, item in enumerate(items):
        following = items[(place + 1) % len(items)].answers
        answer, prompt = following[place % len(following)], prompt_of(item.answers[0])
        first = len(prompt_of(answer))
        tokens = prompt + tuple(answer.tokens[first:])
        weights = (0.0,) * len(prompt) + tuple(answer.weights[first:])
        found.append(TokenisedRecord(tokens[: length + 1], weights[: length + 1]))
    return found


class AnswerBatches:
    """Batches of judged answers, packed as `RecordBatches` does.

    reference: fp32, of all items' answers one after another. others: each item's stranger and their reference, or none.
    """

    def __init__(
        self,
        items: Sequence[Judged],
        reference: Tensor,
        seed: int,
        batch_tokens: int,
        sequence_length: int,
        microbatches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        others: tuple[Sequence[TokenisedRecord], Tensor] | None = None,
    ) -> None:
        groups, answers = [len(item.answers) for item in items], [one for item in items for one in item.answers]
        division = (seed, batch_tokens, sequence_length, microbatches, rank, world_size)
        self._batches = RecordBatches(answers, *division, groups=groups)
        self._liked, self._reference = [item.liked for item in items], reference.split(groups)
        self._others = RecordBatches(others[0], seed, sequence_length, sequence_length) if others else None
        self._others_reference = others[1] if others else reference

    def __call__(self, step: int) -> list[AnswerBatch]:
        """Return this process's microbatches of the global batch `step`."""
        rows = self._batches.rows(step)
        return [self.batch([rows[row] for row in piece]) for piece in self._batches.division.pieces]

    def batch(self, rows: Sequence[Sequence[int]]) -> AnswerBatch:
        """Return the items of these rows as one batch."""
        items = [item for row in rows for item in row]
        return AnswerBatch(
            **vars(self._batches.batch(rows)),
            documents=torch.tensor(self._batches.documents(rows), dtype=torch.int64),
            liked=torch.tensor([liked for item in items for liked in self._liked[item]]),
            reference=torch.cat([self._reference[item] for item in items]),
            strangers=self._others.batch(self._others.fill(items)) if self._others else None,
            strangers_reference=float(self._others_reference[items].sum()) if self._others else 0.0,
            strangers_count=len(items),
        )

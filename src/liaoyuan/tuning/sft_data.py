"""What supervised fine-tuning reads: conversations, plain texts, and general text mixed in against forgetting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liaoyuan.data import (
    Examples,
    Record,
    RecordTokens,
    TokenisedFile,
    TokenisedRecord,
    Tokenizer,
    tokenise,
    tokenise_file,
)
from liaoyuan.data.permutation import permutation
from liaoyuan.data.records import Kind
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Report

LEARNED: tuple[Kind, ...] = ("chat", "text")


@dataclass(frozen=True)
class Source:
    """The records of a file that are fit to be learned, and their tokens; `numbers`: which of the file's each one is,
    by the identity of the object.
    """

    records: list[Record]
    numbers: dict[int, int]
    tokens: TokenisedFile

    def tokens_of(self, records: Iterable[Record]) -> RecordTokens:
        """Return the tokens of some of the records, in the order of the file."""
        chosen = [self.numbers[id(record)] for record in records]
        return self.tokens.records.select(np.flatnonzero(np.isin(self.tokens.numbers, chosen)))


def read_source(path: Path, tokenizer: Tokenizer, length: int, skip_bad: bool, report: Report) -> Source:
    """Read and tokenise a file of conversations and texts; texts are cut into pieces of at most `length` predictions.

    Raises:
        LiaoyuanError: the file is missing or wrong, or has records that are bad, of another kind or too long, and
            `skip_bad` is not set.
    """
    tokens = tokenise_file(path, tokenizer, LEARNED, skip_bad, report).within(length, skip_bad)
    kept = set(tokens.numbers.tolist())
    numbered = [(number, record) for number, record in enumerate(Examples(path)) if number in kept]
    return Source([record for _, record in numbered], {id(record): number for number, record in numbered}, tokens)


def tokenise_all(tokenizer: Tokenizer, records: Sequence[Record], length: int) -> list[TokenisedRecord]:
    """Return the tokens of conversations and texts in the order of the records; a text is cut into pieces of at most
    `length` predictions, each token of which is learned.

    Raises:
        LiaoyuanError: a record is of another kind, or a conversation is longer than `length`.
    """
    found = []
    for record in records:
        if record.kind not in LEARNED:
            verb = {"preference": "tune dpo", "unpaired": "tune dpo", "prompt": "tune rl"}[record.kind]
            raise LiaoyuanError(
                f"Record {record.id!r} is of the kind '{record.kind}', which {verb} learns from; tune sft learns from "
                "'chat' and 'text'."
            )
        found += _pieces(tokenizer, record, length) if record.kind == "text" else [_whole(tokenizer, record, length)]
    return found


def _whole(tokenizer: Tokenizer, record: Record, length: int) -> TokenisedRecord:
    (one,) = tokenise(tokenizer, [record])
    if len(one.tokens) - 1 > length:
        raise LiaoyuanError(
            f"Record {record.id!r} has {len(one.tokens) - 1} tokens, more than sequence_length ({length}): raise it "
            "(and train.batch_tokens), or shorten the record."
        )
    return one


def _pieces(tokenizer: Tokenizer, record: Record, length: int) -> list[TokenisedRecord]:
    """Return a text between two tokens that end texts, as pretraining has it; every piece goes on where one ended."""
    separator = tokenizer.end_of_text_id
    if separator is None:
        raise LiaoyuanError("The tokenizer has no token that ends a text (bos_token or eos_token).")
    text = "".join(message.content for message in record.messages)
    ids = [separator, *tokenizer.encode(text), separator]
    cuts = range(0, len(ids) - 1, length)
    pieces = [tuple(ids[cut : cut + length + 1]) for cut in cuts]
    return [TokenisedRecord(piece, (0.0,) + (1.0,) * (len(piece) - 1)) for piece in pieces]


def with_replay(
    records: Sequence[TokenisedRecord], general: Sequence[TokenisedRecord], share: float, seed: int
) -> list[TokenisedRecord]:
    """Return the records with so much general text that it makes `share` of all tokens, drawn by the seed.

    Mixing old data in keeps what was known: 1% is enough for tasks in Scialom et al. 2022 (arXiv 2205.12393), 5% for
    more text of the same language and 25% for another one in Ibrahim et al. 2024 (arXiv 2403.08763). Where there is
    less of it than asked for, all of it is taken, once.
    """
    wanted = share / (1.0 - share) * sum(len(record.tokens) for record in records)
    order, drawn, size = permutation(len(general), seed, 0), list[TokenisedRecord](), 0
    for place in range(len(general)):
        if size >= wanted:
            break
        drawn.append(general[order[place]])
        size += len(drawn[-1].tokens)
    return [*records, *drawn]

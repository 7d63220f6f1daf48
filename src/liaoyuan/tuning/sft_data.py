"""What supervised fine-tuning reads: conversations, plain texts, and general text mixed in against forgetting."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liaoyuan.data import (
    FileRecords,
    RecordTokens,
    TokenisedFile,
    Tokenizer,
    tokenise_file,
)
from liaoyuan.data.permutation import permutation
from liaoyuan.data.records import Kind
from liaoyuan.rundir import Report

LEARNED: tuple[Kind, ...] = ("chat", "text")


@dataclass(frozen=True)
class Source:
    """The records of a file that are fit to be learned, which stay in the file, and their tokens."""

    records: FileRecords
    tokens: TokenisedFile

    def tokens_of(self, records: FileRecords) -> RecordTokens:
        """Return the tokens of some of the records."""
        return self.tokens.records.select(np.flatnonzero(np.isin(self.tokens.numbers, records.numbers)))


def read_source(path: Path, tokenizer: Tokenizer, length: int, skip_bad: bool, report: Report) -> Source:
    """Read and tokenise a file of conversations and texts; texts are cut into pieces of at most `length` predictions.

    Raises:
        LiaoyuanError: the file is missing or wrong, or has records that are bad, of another kind or too long, and
            `skip_bad` is not set.
    """
    tokens = tokenise_file(path, tokenizer, LEARNED, skip_bad, report).within(length, skip_bad)
    return Source(FileRecords(path, np.unique(tokens.numbers), report), tokens)


def with_replay(records: RecordTokens, general: RecordTokens, share: float, seed: int) -> RecordTokens:
    """Return the records with so much general text that it makes `share` of all tokens, drawn by the seed.

    Mixing old data in keeps what was known: 1% is enough for tasks in Scialom et al. 2022 (arXiv 2205.12393), 5% for
    more text of the same language and 25% for another one in Ibrahim et al. 2024 (arXiv 2403.08763). Where there is
    less of it than asked for, all of it is taken, once.
    """
    wanted = share / (1.0 - share) * records.sizes.sum()
    order = permutation(len(general), seed, 0).whole()
    enough = int(np.searchsorted(np.cumsum(general.sizes[order]), wanted)) + 1 if wanted > 0 else 0
    return records.followed_by(general.select(order[:enough]))

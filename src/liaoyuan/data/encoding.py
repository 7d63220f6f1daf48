"""Rendered conversations to ids, many at once: the library's quick way, and where each piece of a text begins.

The quick way tells no places. Where a tokenizer keeps every byte of a text, they follow from the tokens' lengths; a
text of which that is not sure is encoded in the ordinary way.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from liaoyuan.data.opaque import GUARD
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError

KEEPING = {"Sequence", "Split", "ByteLevel", "Digits"}  # pre-tokenizers that add nothing to a text
MARKED = re.compile(f"{GUARD}(\\d+){GUARD}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text in pieces of one loss weight; `hidden`: what stand-ins in it stand for."""

    texts: list[str]
    weights: list[float]
    hidden: Sequence[str] = ()

    def shown(self) -> list[str]:
        """Return the pieces as people read them, without stand-ins."""
        return [MARKED.sub(lambda match: self.hidden[int(match[1])], text) for text in self.texts]


@dataclass(frozen=True)
class Encoded:
    """R conversations as ids. ids: uint32 [T], of all of them; sizes: int64 [R], how many of each.

    ends: int64 [P], after which of its conversation's tokens each piece ends; pieces: int64 [R], how many of each.
    """

    ids: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    pieces: np.ndarray

    def parts(self) -> list[list[list[int]]]:
        """Return the ids of each piece of each conversation."""
        found, piece, begin = [], 0, 0
        for size, count in zip(self.sizes.tolist(), self.pieces.tolist(), strict=True):
            cuts = [0, *self.ends[piece : piece + count].tolist()]
            ids = self.ids[begin : begin + size].tolist()
            found.append([ids[first:last] for first, last in pairwise(cuts)])
            piece, begin = piece + count, begin + size
        return found


class Encoder:
    """Encodes the conversations of one tokenizer, in two steps, so that the first may run beside other work."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._is_quick = keeps_bytes(tokenizer)
        self._composes = bool(tokenizer.pipeline["normalizer"])  # what is not in Unicode's form NFC

    def __call__(self, rendered: Sequence[Rendered]) -> Encoded:
        """Return conversations as ids.

        Raises:
            LiaoyuanError: the tokenizer joins a prompt and its answer, and cannot encode them apart.
        """
        return self.finish(rendered, self.start(rendered))

    def start(self, rendered: Sequence[Rendered]) -> list[tokenizers.Encoding]:
        """Return the library's encodings of all that has no stand-ins; Python's lock is free meanwhile."""
        texts = ["".join(one.texts) for one in rendered if not one.hidden]
        if self._is_quick:
            return self.tokenizer.encode_rendered_quickly(texts)
        return self.tokenizer.encode_rendered_batch(texts)

    def finish(self, rendered: Sequence[Rendered], encodings: Sequence[tokenizers.Encoding]) -> Encoded:
        """Return the conversations that `start` has encoded; raises as the whole call does."""
        given = iter(encodings)
        found = [None if one.hidden else next(given) for one in rendered]
        rows = [encoding.ids if encoding and self._is_quick else [] for encoding in found]
        ids, sizes = _joined(rows)
        pieces = np.array([len(one.texts) for one in rendered], dtype=np.int64)
        ends: np.ndarray = np.zeros(pieces.sum(), np.int64)
        unsure: Sequence[int] = range(len(rows))
        if self._is_quick:
            ends, unsure = self._ends(rendered, byte_widths(self.tokenizer)[ids], sizes, pieces)
        if len(unsure):
            begins = np.cumsum(pieces) - pieces
            for row in unsure:
                encoding = None if self._is_quick else found[row]
                rows[row], ends[begins[row] : begins[row] + pieces[row]] = _one(self.tokenizer, rendered[row], encoding)
            ids, sizes = _joined(rows)
        return Encoded(ids, sizes, ends, pieces)

    def _ends(
        self, rendered: Sequence[Rendered], widths: np.ndarray, sizes: np.ndarray, pieces: np.ndarray
    ) -> tuple[np.ndarray, Sequence[int]]:
        """Return after which token each piece ends, by the bytes of both; and the conversations where that is unsure.

        It is sure where the tokens have as many bytes as the text, and one of them ends wherever a piece does.
        """
        lengths = [len(text) if text.isascii() else len(text.encode()) for one in rendered for text in one.texts]
        places = before(np.array(lengths, dtype=np.int64))  # in bytes of text, before each piece and after the last
        reached = before(widths)  # in bytes of tokens
        first_piece, first_token = before(pieces), before(sizes)
        text_begins, token_begins = places[first_piece], reached[first_token]
        owner = np.repeat(np.arange(len(sizes)), pieces)
        targets = places[1:] + (token_begins[:-1] - text_begins[:-1])[owner]
        found = np.searchsorted(reached, targets)
        is_exact = reached[np.minimum(found, len(widths))] == targets
        is_sure = np.diff(text_begins) == np.diff(token_begins)
        is_sure &= np.bincount(owner[~is_exact], minlength=len(sizes)) == 0
        if self._composes:
            is_sure &= np.array([unicodedata.is_normalized("NFC", "".join(one.texts)) for one in rendered], dtype=bool)
        return found - first_token[:-1][owner], np.flatnonzero(~is_sure).tolist()


def keeps_bytes(tokenizer: Tokenizer) -> bool:
    """Return whether the tokens of a text spell it byte by byte: the tokenizer adds nothing to it.

    A byte-level BPE spells each byte as one character. Whatever it might leave out of a text, or read as a token that
    is longer than it, shows in the sum of their widths.
    """
    normalizer, model = tokenizer.pipeline["normalizer"] or {}, tokenizer.pipeline["model"]
    steps = list(_steps(tokenizer.pipeline["pre_tokenizer"] or {}))
    kinds = {step.get("type") for step in steps}
    adds = any(step.get("add_prefix_space") for step in steps)
    spelt = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("byte_fallback")
    if normalizer.get("type", "NFC") != "NFC" or "ByteLevel" not in kinds or not kinds <= KEEPING or adds or spelt:
        return False
    # What has no token is left out, or another is put in its place.
    return model.get("type") == "BPE" and all(map(tokenizer.has_token, pre_tokenizers.ByteLevel.alphabet()))


@lru_cache(maxsize=2)
def byte_widths(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many bytes of text each token stands for, int64 [V], of a tokenizer that `keeps_bytes`."""
    vocabulary = tokenizer.vocabulary()
    widths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    widths[list(vocabulary.values())] = [len(token) for token in vocabulary]
    for token, index in tokenizer.added.items():
        widths[index] = len(token.encode())
    return widths


def _steps(pre_tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield pre_tokenizer
    for step in pre_tokenizer.get("pretokenizers") or []:
        yield from _steps(step)


def _joined(rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all rows, uint32, and how many there are of each."""
    ids = array("I")
    for row in rows:
        ids.fromlist(row)
    return np.frombuffer(ids, dtype=np.uint32), np.array([len(row) for row in rows], dtype=np.int64)


def before(counts: np.ndarray) -> np.ndarray:
    """Return the sums of all that comes before each place, and of all: one more than there are counts."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def _one(tokenizer: Tokenizer, one: Rendered, encoding: Any) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and where its pieces end, by the library's own places, which may be given."""
    if not one.hidden:
        encoding = encoding or tokenizer.encode_rendered_batch(["".join(one.texts)])[0]
        ends, place = list[int](), 0
        for text in one.texts[:-1]:
            place += len(text)
            token = encoding.char_to_token(place)
            if token is None or encoding.token_to_chars(token)[0] != place:
                break
            ends.append(token)
        else:
            return encoding.ids, [*ends, len(encoding.ids)]
        if tokenizer.strips_space:
            where = "".join(one.texts)[max(0, place - 16) : place + 16]
            raise LiaoyuanError(
                "The tokenizer joins the end of a prompt and the beginning of its answer to one token, in "
                f"{where!r}: let the chat template end a prompt with a line break or a special token."
            )
    ends, ids = [], []
    for text in one.texts:
        ids += tokenizer.encode_rendered(text, one.hidden)
        ends.append(len(ids))
    return ids, ends

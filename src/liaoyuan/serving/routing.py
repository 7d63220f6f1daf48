"""Which replica gets a request: one that is not much busier than the least busy, and of these the one that has most
likely computed the beginning of its prompt.

A front of replicas does not tokenise. It knows a prompt by its text, in pieces of `PIECE` characters, each known by a
hash that stands for all text up to its end, and remembers which replicas were given which.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from liaoyuan.inference import Request

PIECE = 256  # characters, about 64 tokens: a few blocks of the cache
TOKENS = 64  # the same of a prompt that is tokens
MOST_PIECES = 256  # of one prompt
REMEMBERED = 200_000  # pieces, about 50 MB of text
# What decides whether two requests can share keys and values at all, and then what the prompt is made of, in order.
KINDS = ("model", "cache_salt")
CONTENTS = ("tools", "system", "instructions", "messages", "prompt", "input", "query")
SLACK = 4  # requests by which a replica may be busier than the least busy one for the sake of its cache
RELATIVE_SLACK = 0.5  # the same as a part of what the least busy one has

Digest = bytes


class Routes:
    """What replicas, by number, were given before."""

    def __init__(self) -> None:
        self._had: OrderedDict[Digest, set[int]] = OrderedDict()

    def choose(self, pieces: list[Digest], busy: Mapping[int, int]) -> int:
        """Return the replica for a prompt; busy: the requests that each of those that may be chosen has."""
        least = min(busy.values())
        near = [number for number, count in busy.items() if count <= least + max(SLACK, least * RELATIVE_SLACK)]
        known = self._known(pieces, near)
        return min(near, key=lambda number: (-known[number], busy[number], number))

    def given(self, pieces: list[Digest], number: int) -> None:
        """Remember that a replica got a prompt."""
        for piece in pieces:
            self._had.setdefault(piece, set()).add(number)
            self._had.move_to_end(piece)
        while len(self._had) > REMEMBERED:
            self._had.popitem(last=False)

    def forget(self, number: int) -> None:
        """Forget what a replica had: it is a new one."""
        for replicas in list(self._had.values()):  # who watches replicas calls this from a thread of his own
            replicas.discard(number)

    def _known(self, pieces: list[Digest], numbers: Collection[int]) -> dict[int, int]:
        """Return how many of the first pieces each replica was given."""
        known = dict.fromkeys(numbers, 0)
        for index, piece in enumerate(pieces):
            having = self._had.get(piece, ())
            for number in having:
                if known.get(number) == index:
                    known[number] = index + 1
        return known


def token_pieces(request: Request) -> list[Digest]:
    """Return the hashes by which a prompt of token ids is known."""
    digest = hashlib.blake2b(_text([request.adapter, request.salt]).encode(), digest_size=16).digest()
    tokens, pieces = np.array(request.prompt[: MOST_PIECES * TOKENS], dtype=np.int64), []
    for end in range(TOKENS, len(tokens) + 1, TOKENS):
        digest = hashlib.blake2b(tokens[end - TOKENS : end].tobytes(), digest_size=16, key=digest).digest()
        pieces.append(digest)
    return pieces


def prompt_pieces(body: Any) -> list[Digest]:
    """Return the hashes by which the prompt of a request is known; none for what has no prompt."""
    if not isinstance(body, dict):
        return []
    text = "".join(_text(body[name]) for name in CONTENTS if name in body)
    digest = hashlib.blake2b(_text([body.get(name) for name in KINDS]).encode(), digest_size=16).digest()
    pieces = []
    for start in range(0, min(len(text) - PIECE + 1, MOST_PIECES * PIECE), PIECE):
        piece = text[start : start + PIECE].encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(piece, digest_size=16, key=digest).digest()
        pieces.append(digest)
    return pieces


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

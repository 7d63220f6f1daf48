"""Which tokens a completion may go on with: its constraint, its allowed tokens, its bad words, and no end before
`min_tokens`.
"""

import numpy as np

from liaoyuan.inference.constraints.constraint import ConstraintState
from liaoyuan.inference.sequence import Sequence


def may_forbid(sequence: Sequence) -> bool:
    """Return whether some token may ever be forbidden to this sequence."""
    sampling = sequence.request.sampling
    own = sampling.bad_words or sampling.min_tokens or sampling.allowed_tokens
    return bool(sequence.state is not None or own)


def allowed(
    sequence: Sequence, state: ConstraintState | None, tokens: np.ndarray, vocabulary: int
) -> np.ndarray | None:
    """Return the allowed tokens as bits, int32 [ceil(V / 32)], the lowest bit first; None: all.

    tokens: int64 [n], the prompt and what was generated; state: of the constraint after them. Where all would be
    forbidden, only the constraint counts.
    """
    sampling = sequence.request.sampling
    held = state.mask() if state is not None else None
    forbidden = _ends_of_bad_words(sampling.bad_words, tokens)
    if len(tokens) - len(sequence.request.prompt) < sampling.min_tokens:
        forbidden += sampling.stop_token_ids
    if not forbidden and not sampling.allowed_tokens:
        return held
    words = -(-vocabulary // 32)
    mask = np.full(words, -1, dtype=np.int32) if held is None else held.copy()
    if sampling.allowed_tokens:
        mask &= _bits(sampling.allowed_tokens, words)
    for token in forbidden:
        if 0 <= token < vocabulary:
            mask[token // 32] &= ~_bit(token)
    return mask if mask.any() else held


def _bits(tokens: tuple[int, ...], words: int) -> np.ndarray:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _bit(token: int) -> np.int32:
    return (np.uint32(1) << np.uint32(token % 32)).astype(np.int32)


def _ends_of_bad_words(words: tuple[tuple[int, ...], ...], tokens: np.ndarray) -> tuple[int, ...]:
    """Return the last token of each word whose other tokens are the last ones so far."""
    return tuple(
        word[-1]
        for word in words
        if len(word) == 1 or (len(tokens) >= len(word) - 1 and tuple(tokens[1 - len(word) :].tolist()) == word[:-1])
    )

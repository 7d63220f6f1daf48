"""Embeddings: a text as one vector, pooled from the last hidden states of a decoder.

Sentence embeddings from pooled states: Reimers and Gurevych 2019 (arXiv 1908.10084), sec. 3.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.spread.memory import Memory
from liaoyuan.models import AttentionContext, Decoder, packed_context
from liaoyuan.rundir import read_json

BLOCK_SIZE = 16
PREFIX = "pooling_mode_"
MODES = {"mean_tokens": "mean", "lasttoken": "last"}  # by sentence-transformers' names

Step = Callable[[Decoder, Memory], list[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Pooling:
    """What is taken of a text's hidden states: their mean, the last one, or (none) all of them."""

    mode: Literal["mean", "last", "none"] = "mean"


def read_pooling(folder: Path) -> Pooling:
    """Return the pooling of a model folder as sentence-transformers writes it (`1_Pooling/config.json`).

    The mean if the folder says nothing: the last state of a model that was trained to go on with a text is about the
    token to come more than about the text.

    Raises:
        LiaoyuanError: the folder asks for another way.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return Pooling()
    settings = read_json(path)
    wanted = [name.removeprefix(PREFIX) for name, on in settings.items() if name.startswith(PREFIX) and on is True]
    if len(wanted) != 1 or wanted[0] not in MODES:
        raise LiaoyuanError(f"{path} asks for {wanted or 'no pooling'}; this server knows {' and '.join(MODES)}.")
    return Pooling("mean" if MODES[wanted[0]] == "mean" else "last")


def embedding_steps(token_lists: Sequence[Sequence[int]], pooling: Pooling, most: int) -> Iterator[Step]:
    """Yield steps of at most `most` tokens each; called in order with a model and its memory they embed all texts.

    A step returns (number of the text, its embedding fp32 [H], or [tokens, H] of all, on the CPU) for every text that
    it finishes. Short texts share a step, a long one takes several, over a cache of its own.
    """
    group: list[int] = []
    for number, tokens in enumerate(token_lists):
        if group and sum(len(token_lists[each]) for each in (*group, number)) > most:
            yield _packed(token_lists, group, pooling)
            group = []
        if len(tokens) <= most:
            group.append(number)
        else:
            long = _LongText(number, tokens, pooling)
            yield from (long.step(start, start + most) for start in range(0, len(tokens), most))
    if group:
        yield _packed(token_lists, group, pooling)


def _packed(token_lists: Sequence[Sequence[int]], group: Sequence[int], pooling: Pooling) -> Step:
    def step(model: Decoder, memory: Memory) -> list[tuple[int, Tensor]]:
        lengths = [len(token_lists[number]) for number in group]
        positions, context = packed_context(lengths, model.embed_tokens.weight.device)
        tokens = [token for number in group for token in token_lists[number]]
        hidden = _hidden_states(model, tokens, positions, context).split(lengths)
        pooled = [rows[-1] if pooling.mode == "last" else rows for rows in hidden]
        if pooling.mode == "mean":
            pooled = [rows.mean(0) for rows in pooled]
        return [(number, row.cpu()) for number, row in zip(group, pooled, strict=True)]

    return step


class _LongText:
    """A text that is read in several steps: its cache, and what it has given so far: the sum, or all of it."""

    def __init__(self, number: int, tokens: Sequence[int], pooling: Pooling) -> None:
        self._number, self._tokens, self._pooling = number, tokens, pooling
        self._cache: KeyValueCache | None = None
        self._sum = torch.zeros(())
        self._rows: list[Tensor] = []

    def step(self, start: int, end: int) -> Step:
        def step(model: Decoder, memory: Memory) -> list[tuple[int, Tensor]]:
            hidden = self._advance(model, memory, start, min(end, len(self._tokens)))
            self._sum = self._sum + hidden.sum(0)
            self._rows += [hidden.cpu()] if self._pooling.mode == "none" else []
            if end < len(self._tokens):
                return []
            if self._pooling.mode == "none":
                return [(self._number, torch.cat(self._rows))]
            last = self._pooling.mode == "last"
            return [(self._number, (hidden[-1] if last else self._sum / len(self._tokens)).cpu())]

        return step

    def _advance(self, model: Decoder, memory: Memory, start: int, end: int) -> Tensor:
        device = model.embed_tokens.weight.device
        blocks = -(-len(self._tokens) // BLOCK_SIZE)
        if self._cache is None:
            self._cache = memory.new_cache(blocks, BLOCK_SIZE)
        positions = torch.arange(start, end, device=device)
        tables = torch.arange(blocks, dtype=torch.int32, device=device)[None]
        starts, lengths = (
            torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, end - start], [end])
        )
        # The blocks are in order, so a token's slot is its position.
        context = PagedContext(self._cache, positions, tables, starts, lengths)
        return _hidden_states(model, self._tokens[start:end], positions, context)


@torch.inference_mode()
def _hidden_states(model: Decoder, tokens: Sequence[int], positions: Tensor, context: AttentionContext) -> Tensor:
    """Return what the last norm gives, fp32 [N, H]."""
    ids = torch.tensor(tokens, device=positions.device)
    return model(ids, positions, context, hidden=True).float()

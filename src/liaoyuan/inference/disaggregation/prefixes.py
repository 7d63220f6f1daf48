"""Blocks of an engine's prefix cache on their way to another engine's: read under a lease, checked, and put there.

A block's key stands for the weights' version, adapter, salt and all tokens up to its end, so both sides know which
block they speak of. Weights and shapes are told apart by `describe`. All of this runs in the engine's thread.
"""

import hashlib
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.blocks import Key
from liaoyuan.inference.cache import KeyValueCache
from liaoyuan.inference.disaggregation.lease import Leases
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.request import Request
from liaoyuan.inference.sequence import block_keys, root_key
from liaoyuan.ops import checksum


class Torn(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """Blocks came out of order, of another engine, or with other bytes than were sent."""


@dataclass(frozen=True)
class Lot:
    """Consecutive blocks of one prompt.

    of: see `describe`. data: for each block the keys [layers, block_size, Hk, D] and values [..., Dv] as bytes.
    """

    of: str
    keys: tuple[Key, ...]
    checksums: tuple[int, ...]
    data: bytes


class Prefixes:
    """The prefix cache of one engine, as another process sees it."""

    def __init__(self, engine: Engine, lease_seconds: float) -> None:
        """
        Raises:
            LiaoyuanError: the engine's cache lies over several processes, or keeps no prefixes.
        """
        if type(engine.cache) is not KeyValueCache:
            raise LiaoyuanError("A model spread over several processes cannot hand over its cache's blocks yet.")
        if not engine.config.prefix_cache:
            raise LiaoyuanError("Blocks are handed over through the prefix cache: set prefix_cache to true.")
        self._engine, self._pool = engine, engine.pool
        self.leases = Leases(lease_seconds, self._pool.give)
        engine.lenders.append(self.leases.held)
        self._described: tuple[int, str] | None = None
        self.block_size = engine.config.block_size

    def describe(self) -> str:
        """Return what blocks must have in common to be of use elsewhere: weights, model and block size."""
        engine = self._engine
        if self._described is None or self._described[0] != engine.version:
            words = [engine.version, engine.checksum(), engine.config.block_size, engine.model.config]
            self._described = engine.version, hashlib.sha256(repr(words).encode()).hexdigest()
        return self._described[1]

    def keys(self, request: Request) -> list[Key]:
        """Return the keys of the blocks that may be handed over; the last token of a prompt is always computed."""
        if request.sampling.prompt_logprobs is not None:
            return []  # every row is computed
        keys: list[Key] = []
        size = self._engine.config.block_size
        tokens = np.array(request.prompt[: (len(request.prompt) - 1) // size * size], dtype=np.int64)
        block_keys(root_key(self._engine.version, self.adapter(request), request.salt), keys, tokens, size)
        return keys

    def adapter(self, request: Request) -> str:
        """Return the digest of the request's adapter: two workers may know different ones by one name."""
        return self._engine.adapters.find(request.adapter).digest

    def renew(self) -> None:
        """Look at the weights again: they may have been replaced, even under the number that they had."""
        self._described = None
        if self._engine.has_weights:
            self.describe()

    def known(self, keys: list[Key]) -> int:
        """Return how many of the first of these blocks are here."""
        return len(self._pool.find(keys))

    def lend(self, lease: str, keys: list[Key], first: int, most: int) -> Lot | None:
        """Hold the next blocks from `first` on that are here, at most `most`, and return them; None: none is yet, or
        half of the cache is lent.

        Raises:
            LeaseEnded: the reader is too late. LiaoyuanError: the engine has no cache, since it sleeps.
        """
        blocks = self._pool.find(keys[first : first + most])
        if not len(blocks) or len(self.leases.held()) + len(blocks) > self._pool.size // 2:
            return None
        self._pool.share(blocks)
        try:
            self.leases.add(lease, blocks)
        except LiaoyuanError:
            self._pool.give(blocks)
            raise
        rows = self._read(blocks)
        sums = tuple(checksum(row) for row in rows)
        return Lot(self.describe(), tuple(keys[first : first + len(blocks)]), sums, rows.numpy().tobytes())

    def put(self, lot: Lot, keys: list[Key], first: int) -> bool:
        """Check the blocks from the place `first` on, and let them be found; False if there is no room for them.

        Raises:
            Torn: nothing was put.
        """
        rows = self._checked(lot, keys, first)
        wanted = [place for place, key in enumerate(lot.keys) if not len(self._pool.find([key]))]
        if len(wanted) > self._pool.free - self._engine.statistics()["running"]:
            return False  # who runs comes first
        blocks = self._pool.take(len(wanted))
        self._write(rows[wanted], blocks)
        for place, block in zip(wanted, blocks.tolist(), strict=True):
            self._pool.remember(lot.keys[place], block)
        self._pool.give(blocks)
        return True

    def grant(self, lease: str, first: int) -> None:
        """Begin a lease of the blocks from the place `first` on."""
        self.leases.grant(lease, first, time.monotonic())

    def hear(self, lease: str, got: int | None) -> None:
        """The reader of a lease lives, and has the blocks before the place `got`; see `Leases.acknowledge`."""
        self.leases.acknowledge(lease, got, time.monotonic())

    def _checked(self, lot: Lot, keys: list[Key], first: int) -> Tensor:
        """Return the blocks' bytes, uint8 [blocks, bytes], if they are what was asked for, and whole."""
        if lot.of != self.describe():
            raise Torn("The blocks are of other weights, or of another shape.")
        if lot.keys != tuple(keys[first : first + len(lot.keys)]) or not lot.keys:
            raise Torn(f"The blocks are not those of the prompt from place {first} on.")
        count, size = len(lot.keys), sum(part.nbytes for part in self._parts(np.zeros(1, dtype=np.int32)))
        if len(lot.data) != count * size or len(lot.checksums) != count:
            raise Torn(f"{count} blocks have {count * size} bytes; {len(lot.data)} came.")
        rows = torch.frombuffer(bytearray(lot.data), dtype=torch.uint8).view(count, size)
        if tuple(checksum(row) for row in rows) != lot.checksums:
            raise Torn(f"The bytes of the blocks from place {first} on are not those that were sent.")
        return rows

    def _parts(self, blocks: np.ndarray) -> list[Tensor]:
        """Return copies of the blocks' keys and values, layer by layer, [blocks, ...] each."""
        places = torch.from_numpy(blocks.astype(np.int64))
        return [layer.index_select(0, places.to(layer.device)).flatten(1) for layer in self._engine.cache.layers()]

    def _read(self, blocks: np.ndarray) -> Tensor:
        """Return the blocks' bytes, uint8 [blocks, bytes], on the CPU."""
        return torch.cat([part.cpu().view(torch.uint8) for part in self._parts(blocks)], 1).contiguous()

    def _write(self, rows: Tensor, blocks: np.ndarray) -> None:
        places, at = torch.from_numpy(blocks.astype(np.int64)), 0
        for layer in self._engine.cache.layers():
            size = layer[0].nbytes
            part = rows[:, at : at + size].contiguous().view(layer.dtype).view(-1, *layer.shape[1:])
            layer.index_copy_(0, places.to(layer.device), part.to(layer.device))
            at += size

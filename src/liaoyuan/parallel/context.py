"""Context parallelism: several processes share one sequence, documents packed in it included.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): for attention, processes swap tokens for heads. Ring (Liu et al. 2023,
arXiv 2310.01889): keys and values go round while each process attends to those it holds. The hybrid does both on a
mesh [ring, ulysses]. In the ring, process r of R holds pieces r and 2 R - 1 - r of 2 R, which balances the causal
triangle. What a token sees is a range of the sequence, so document masks and sliding windows cost nothing extra.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liaoyuan.models import Pattern
from liaoyuan.ops import attention, block_attention, block_attention_backward, merge, wide
from liaoyuan.parallel.collectives import exchange_rows
from liaoyuan.parallel.mesh import Mesh


def own_rows(tokens: int, mesh: Mesh) -> Tensor:
    """Return which of a microbatch's `tokens` rows this process has, int64 [tokens / (ring * ulysses)]."""
    rows = torch.cat([torch.arange(piece.start, piece.stop) for piece in _pieces(tokens, mesh, mesh.place("ring"))])
    return rows.chunk(mesh.layout.cp.ulysses)[mesh.place("ulysses")]


@dataclass(frozen=True)
class SharedContext:
    """The attention context of one microbatch of `tokens` rows of which this process has `own_rows`.

    boundaries: int32 [M + 1] on the CPU, of the documents in the whole microbatch.
    """

    boundaries: Tensor
    tokens: int
    mesh: Mesh
    _rings: dict[tuple[int | None, float], "Ring"] = field(default_factory=dict)  # layers that attend alike share one

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        """See `AttentionContext`; the tensors hold this process's rows."""
        size, group = self.mesh.layout.cp.ulysses, self.mesh.group("ulysses")
        heads = query.shape[1]
        if size > 1:
            key, value = (_enough_heads(x, size) for x in (key, value))
            query, key, value = _tokens_for_heads(query, key, value, group)
            if pattern.sinks is not None:
                sinks = pattern.sinks.chunk(size)[group.rank()]
                pattern = Pattern(pattern.scale, pattern.window, sinks)
        out = self._attend(query, key, value, pattern)
        return _heads_for_tokens(out, heads, group) if size > 1 else out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        if self.mesh.layout.cp.ring == 1:
            boundaries = self.boundaries.to(query.device)
            return attention(query, key, value, boundaries, pattern.scale, pattern.window, pattern.sinks)
        ring = self._ring(pattern.window, pattern.scale)
        out, log_sum_exp = _RingAttention.apply(query, key, value, ring)
        if pattern.sinks is not None:  # the sink takes its share of each softmax
            out = out * torch.sigmoid(log_sum_exp - wide(pattern.sinks))[..., None]
        return out.to(query.dtype)

    def _ring(self, window: int | None, scale: float) -> "Ring":
        if (window, scale) not in self._rings:
            first = _first_seen(self.boundaries, self.tokens, window)
            self._rings[window, scale] = Ring(self.mesh, self.tokens, first, scale)
        return self._rings[window, scale]


def _first_seen(boundaries: Tensor, tokens: int, window: int | None) -> Tensor:
    """Return for each of the microbatch's tokens the first one that it sees, int64 [tokens]."""
    rows = torch.arange(tokens)
    begins = boundaries.long()
    first = begins[torch.searchsorted(begins[1:].contiguous(), rows, right=True)]
    return first if window is None else first.maximum(rows - window + 1)


def _pieces(tokens: int, mesh: Mesh, rank: int) -> list[range]:
    """Return the stretches of the microbatch that process `rank` of the ring holds, its Ulysses group together."""
    size = mesh.layout.cp.ring
    if size == 1:
        return [range(tokens)]
    length = tokens // (2 * size)
    return [range(n * length, (n + 1) * length) for n in (rank, 2 * size - 1 - rank)]


def _enough_heads(x: Tensor, size: int) -> Tensor:
    """Repeat key or value heads [N, Hk, D] so that `size` processes can share them equally."""
    return x.repeat_interleave(math.lcm(x.shape[1], size) // x.shape[1], 1)


def _tokens_for_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Give every process all rows of its share of the heads: [n, H, D] -> [size * n, H / size, D], in one exchange."""
    size, rows = group.size(), query.shape[0]
    parts = [x.reshape(rows, size, -1) for x in (query, key, value)]
    sent = torch.cat(parts, 2).transpose(0, 1).reshape(size * rows, -1)
    got = exchange_rows(sent, [rows] * size, [rows] * size, group)
    split = got.split([part.shape[2] for part in parts], 1)
    dims = (query.shape[2], key.shape[2], value.shape[2])
    return tuple(x.reshape(size * rows, -1, dim) for x, dim in zip(split, dims, strict=True))


def _heads_for_tokens(out: Tensor, heads: int, group: ProcessGroup) -> Tensor:
    """The way back: [size * n, H / size, D] -> [n, H, D]."""
    size, rows = group.size(), out.shape[0] // group.size()
    got = exchange_rows(out.flatten(1), [rows] * size, [rows] * size, group)
    return got.view(size, rows, heads // size, -1).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Ring:
    """One attention over the ring: who sees what, and the exchange of keys and values.

    first: int64 [tokens] on the CPU, the first token that each of the microbatch sees; the last is itself.
    """

    mesh: Mesh
    tokens: int
    first: Tensor
    scale: float
    _blocks: dict[int, list[tuple[slice, slice, Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.mesh.layout.cp.ring

    @property
    def rank(self) -> int:
        return self.mesh.place("ring")

    def blocks(self, step: int) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """Return the blocks that see anything of the keys held after `step` hops: rows of ours, rows of the keys,
        and for each of ours the range of keys, counted within the block.
        """
        if step not in self._blocks:
            self._blocks[step] = self._find_blocks(step)
        return self._blocks[step]

    def _find_blocks(self, step: int) -> list[tuple[slice, slice, Tensor, Tensor]]:
        found = []
        for own, mine in _slices(_pieces(self.tokens, self.mesh, self.rank)):
            for theirs, keys in _slices(_pieces(self.tokens, self.mesh, (self.rank - step) % self.size)):
                place = torch.arange(mine.start, mine.stop)
                first = (self.first[place] - keys.start).clamp(0, len(keys))
                last = (place + 1 - keys.start).clamp(0, len(keys))
                if bool((last > first).any()):
                    found.append((own, theirs, first, last))
        return found

    def start_hop(self, *tensors: Tensor) -> "Hop":
        """Begin to send `tensors` to the next process and to receive those of the one before."""
        group = self.mesh.group("ring")
        after = dist.get_global_rank(group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(group, (self.rank - 1) % self.size)
        sent = [x.contiguous() for x in tensors]
        arriving = tuple(torch.empty_like(x) for x in sent)
        operations = [dist.P2POp(dist.isend, x, after, group) for x in sent]
        operations += [dist.P2POp(dist.irecv, x, before, group) for x in arriving]
        hop = Hop(arriving, dist.batch_isend_irecv(operations), sent)
        if not self.mesh.layout.overlap:
            hop.finish()
        return hop


@dataclass(frozen=True)
class Hop:
    """An exchange under way."""

    arriving: tuple[Tensor, ...]
    works: list[Any]
    sent: list[Tensor]  # kept until it has left

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for it, and return what arrived."""
        while self.works:
            self.works.pop().wait()
        return self.arriving


def _slices(pieces: list[range]) -> list[tuple[slice, range]]:
    begins = [0, *torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()]
    return [(slice(begins[n], begins[n + 1]), piece) for n, piece in enumerate(pieces)]


class _RingAttention(torch.autograd.Function):
    """query [n, Hq, D], key [n, Hk, D], value [n, Hk, Dv] -> output and log of the softmax's denominator, both wide.

    The next keys travel while the present ones are attended to. In the backward pass keys go round once more, and
    their gradients with them until they are home; what their own process adds waits for them there.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        out = wide(query.new_zeros(*query.shape[:2], value.shape[2]))
        lse = torch.full_like(out[..., 0], float("-inf"))
        held: tuple[Tensor, ...] = (key, value)
        for step in range(ring.size):
            hop = ring.start_hop(*held) if step + 1 < ring.size else None
            for own, theirs, first, last in ring.blocks(step):
                ranges = first.to(query.device), last.to(query.device)
                more = block_attention(query[own], held[0][theirs], held[1][theirs], *ranges, ring.scale)
                out[own], lse[own] = merge(out[own], lse[own], *more)
            held = hop.finish() if hop else held
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad = wide(grads[0])
        delta = (grad * out).sum(-1) - grads[1]
        grad_query = torch.zeros_like(wide(query))
        held: tuple[Tensor, ...] = (key, value)
        sums: tuple[Tensor, ...] = tuple(torch.zeros_like(wide(x)) for x in held)
        for step in range(ring.size):
            hop = ring.start_hop(*held) if step + 1 < ring.size else None
            for own, theirs, first, last in ring.blocks(step):
                ranges = first.to(query.device), last.to(query.device)
                keys = held[0][theirs], held[1][theirs]
                parts = block_attention_backward(
                    grad[own], delta[own], lse[own], query[own], *keys, *ranges, ring.scale
                )
                for total, part, rows in zip((grad_query, *sums), parts, (own, theirs, theirs), strict=True):
                    total[rows] += part
            if step == 0:
                home, sums = sums, tuple(torch.zeros_like(x) for x in sums)
            else:
                sums = ring.start_hop(*sums).finish()
            held = hop.finish() if hop else held
        grad_key, grad_value = (own + x for own, x in zip(home, sums, strict=True))
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None

"""Messages from the first process of a group to the others: a kind and some tensors, as one flat int64 tensor.

Nothing is pickled. A message is `FIRST` numbers, and what does not fit into them follows in a second broadcast; its
head is [length of the whole, kind, number of tensors], and each tensor is [dtype, dimensions, sizes ..., values ...].
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

FIRST = 4096  # numbers, 32 KiB: a step of decoding of some hundred sequences
DTYPES = (torch.int64, torch.int32, torch.uint8)
NOTHING = -1  # in the place of a dtype: no tensor here


class Call(IntEnum):
    """What the leader announces."""

    END = 0
    CACHE = 1  # an empty cache: [its number, how many blocks, size of a block]
    DROP = 2  # a cache that nobody needs any more: [its number]
    COPY = 3  # blocks of a cache: [its number], sources, targets
    PAGED = (
        4  # a forward pass: [hidden, number of the cache], tokens, positions, targets, rows, which adapters, context
    )
    PACKED = 5  # one over whole documents: [hidden], tokens, positions, targets, rows, which adapters, context
    READ = 6  # new weights, of a folder: its path
    TAKE = 7  # the weights that were read
    SUM = 8  # the checksum of all weights
    SLEEP = 9  # without weights
    WAKE = 10
    ADAPTER = 11  # which projections it changes, the rank of each; and then its bytes
    NO_ADAPTER = 12  # one that nobody needs any more: [its number]
    LEARN = 13  # training's forward over whole documents: tokens, positions, targets, boundaries
    FORGET = 14  # training's model
    RECORD = 15  # what follows, for who looks for a difference: [whether of training's model], text
    DIFFER = 16  # where two passes that were recorded part
    PROMISE = 17  # which operators have a kernel that promises exactness
    MOVE = 18  # experts: their new placement
    STREAMS = 19  # a further layer's streams: [how many slots]
    OBSERVE = 20  # rows of a further layer: [number of the cache], `FurtherStreams.observe` but the stream, context
    BEGIN = 21  # see `FurtherStreams`: slots
    GUESS = 22  # their logits: slots
    ADVANCE = 23  # [number of the cache], slots, tokens, positions, context


def send(kind: int, tensors: Sequence[Tensor | None], group: ProcessGroup) -> None:
    """Send integer tensors, of any device, from the first process of `group`, which must be on the CPU."""
    message = encode(kind, tensors)
    first = torch.zeros(FIRST, dtype=torch.int64)
    first[: len(message)] = message[:FIRST]
    _broadcast(first, group)
    if len(message) > FIRST:
        _broadcast(message[FIRST:], group)


def receive(group: ProcessGroup) -> tuple[int, list[Tensor | None]]:
    """Return the next message's kind and tensors, on the CPU."""
    message = torch.zeros(FIRST, dtype=torch.int64)
    _broadcast(message, group)
    length = int(message[0])
    if length > FIRST:
        rest = torch.empty(length - FIRST, dtype=torch.int64)
        _broadcast(rest, group)
        message = torch.cat([message, rest])
    return decode(message)


def encode(kind: int, tensors: Sequence[Tensor | None]) -> Tensor:
    """Return a message, int64 [length]."""
    parts = [torch.empty(3, dtype=torch.int64)]
    for tensor in tensors:
        if tensor is None:
            parts.append(torch.tensor([NOTHING]))
        else:
            parts.append(torch.tensor([DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]))
            parts.append(tensor.detach().cpu().long().flatten())
    message = torch.cat(parts)
    message[:3] = torch.tensor([len(message), kind, len(tensors)])
    return message


def decode(message: Tensor) -> tuple[int, list[Tensor | None]]:
    """Return the kind and the tensors of a message; the reverse of `encode`."""
    _, kind, count = message[:3].tolist()
    at = 3
    tensors: list[Tensor | None] = []
    for _ in range(count):
        dtype = int(message[at])
        if dtype == NOTHING:
            tensors.append(None)
            at += 1
            continue
        start = at + 2 + int(message[at + 1])
        shape = torch.Size(message[at + 2 : start].tolist())
        at = start + shape.numel()
        tensors.append(message[start:at].view(shape).to(DTYPES[dtype]))
    return kind, tensors


def text_tensor(text: str) -> Tensor:
    """Return the UTF-8 bytes of a text as a tensor, uint8 [length]."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)


def as_text(values: list[int]) -> str:
    """Return the text of the values of `text_tensor`."""
    return bytes(values).decode("utf-8")


def _broadcast(tensor: Tensor, group: ProcessGroup) -> None:
    dist.broadcast(tensor, group_src=0, group=group)

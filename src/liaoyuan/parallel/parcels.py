"""Rows of tensors that go from some processes to others, as bytes in one exchange, whatever their tensors are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Parcel:
    """A row on its way between two ranks, which may be the same.

    content: contiguous, where it comes from (None in other processes); memory: where it arrives (None elsewhere).
    """

    source: int
    target: int
    nbytes: int
    content: Tensor | None
    memory: Tensor | None


class Exchange:
    """Sends parcels; all processes of the group make it of the same parcels in the same order.

    Memory for what is sent is taken when it is made, so `run` needs none.
    """

    def __init__(self, parcels: Sequence[Parcel], group: ProcessGroup, device: torch.device) -> None:
        self._parcels, self._group, self._place = parcels, group, group.rank()
        sent = [parcel for parcel in parcels if parcel.source != parcel.target]
        self._is_needed = bool(sent)
        going, self._coming = ([0] * group.size() for _ in range(2))
        for parcel in sent:
            if parcel.source == self._place:
                going[parcel.target] += parcel.nbytes
            if parcel.target == self._place:
                self._coming[parcel.source] += parcel.nbytes
        self._going = going
        own = sorted((parcel for parcel in sent if parcel.source == self._place), key=lambda parcel: parcel.target)
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        self._outbox = torch.cat([nothing, *(_bytes(parcel.content) for parcel in own)])
        self._inbox = nothing.new_empty(sum(self._coming))

    @torch.no_grad()
    def run(self) -> None:
        """Send, receive, and put each row where it belongs."""
        if self._is_needed:
            dist.all_to_all_single(self._inbox, self._outbox, self._coming, self._going, group=self._group)
        read = [0] * len(self._coming)
        boxes = self._inbox.split(self._coming)
        for parcel in self._parcels:
            if parcel.target != self._place:
                continue
            start = read[parcel.source]
            if parcel.source == self._place:
                _bytes(parcel.memory).copy_(_bytes(parcel.content))
            else:
                _bytes(parcel.memory).copy_(boxes[parcel.source][start : start + parcel.nbytes])
                read[parcel.source] += parcel.nbytes


def _bytes(row: Tensor | None) -> Tensor:
    assert row is not None and row.is_contiguous()
    return row.view(-1).view(torch.uint8)

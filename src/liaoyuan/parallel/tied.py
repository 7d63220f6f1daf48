"""A tied embedding in a pipeline: the last stage computes with a copy of it as its head.

The embedding of the first stage is the weight. Before each pass its values go to the copy, after it the copy's
gradient comes back and is added: optimiser and checkpoints know the embedding alone. Both ends are cut alike, so each
process exchanges with one other, or with itself where a V brings both ends together.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liaoyuan.models import Decoder
from liaoyuan.parallel.fsdp import local
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.pipeline import process_of


class TiedEnds:
    """The embedding and its copy, as far as they are in this process; every process of the pipeline calls both."""

    def __init__(self, models: Sequence[Decoder], mesh: Mesh) -> None:
        self.models, self.group = models, mesh.group("pp")
        self.first, self.last = process_of(mesh.layout, 0), process_of(mesh.layout, mesh.layout.stages - 1)

    def bring(self) -> None:
        """Give the copy the embedding's values."""
        embedding, head = self._weights()
        source = None if embedding is None else local(embedding.detach())
        self._carry(source, self.first, None if head is None else local(head.detach()), self.last)

    def take_back(self) -> None:
        """Add the copy's gradient to the embedding's, after a backward pass that gave both one."""
        embedding, head = self._weights()
        if any(weight is not None and weight.grad is None for weight in (embedding, head)):
            return  # a frozen embedding, at both ends
        own = None if embedding is None or embedding.grad is None else local(embedding.grad)
        addend = None if own is None else torch.empty_like(own)
        self._carry(None if head is None or head.grad is None else local(head.grad), self.last, addend, self.first)
        if own is not None and addend is not None:
            own.add_(addend)
        if head is not None:
            head.grad = None

    def _weights(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        return self._weight("embed_tokens"), self._weight("lm_head")

    def _weight(self, part: str) -> nn.Parameter | None:
        owner = next((model for model in self.models if part in model._modules), None)
        return None if owner is None else owner.get_parameter(f"{part}.weight")

    def _carry(self, source: Tensor | None, sender: int, place: Tensor | None, receiver: int) -> None:
        if source is not None and place is not None:
            place.copy_(source)
        elif source is not None and source.numel():
            dist.send(source.contiguous(), dist.get_global_rank(self.group, receiver), self.group)
        elif place is not None and place.numel():
            dist.recv(place, dist.get_global_rank(self.group, sender), self.group)

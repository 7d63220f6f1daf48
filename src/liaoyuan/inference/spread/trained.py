"""The model of a replica as training lays it out over the same processes, with the same weights."""

import functools
import gc

import torch
import torch.distributed as dist
from torch import Tensor

from liaoyuan.device import Device
from liaoyuan.models import Decoder, PackedContext
from liaoyuan.parallel import Program, World, lay_out, take_part


class Trained:
    """Training's forward in the layout of a replica. All processes must call it; the first call makes the model."""

    def __init__(self, serving: Program) -> None:
        """serving: the replica, whose layout must be exact; its weights are copied."""
        self._serving = serving
        self._program: Program | None = None

    @functools.cached_property
    def is_known(self) -> bool:
        """Whether training knows these weights: not where they have few bits."""
        with torch.device("meta"):
            names = Decoder(self._serving.config).state_dict().keys()
        return {name for name, _ in self._serving.named_tensors()} == set(names)

    @property
    def model(self) -> Decoder:
        """The model, laid out by `parallel.lay_out`, in training."""
        if self._program is None:
            self._program = self._made()
        return self._program.models[0]

    def __call__(self, tokens: Tensor, positions: Tensor, targets: Tensor, boundaries: Tensor) -> Tensor:
        """Return the log-probabilities of targets, fp32 [N], with their graph; the processes' number must divide N."""
        with torch.enable_grad():
            return self.model(tokens, positions, PackedContext(boundaries), targets)

    def drop(self) -> None:
        """Give the memory back."""
        self._program = None
        gc.collect()  # modules and their hooks refer to each other

    def _made(self) -> Program:
        serving, place = self._serving, self._serving.device
        assert serving.mesh
        world = World(dist.get_rank(), dist.get_world_size(), Device(place.type, place.index), serving.mesh)
        with torch.device("meta"):
            model = Decoder(serving.config)
        program = lay_out(model, serving.mesh.layout, world).train()
        own = dict(program.named_tensors())
        for name, whole in serving.whole_tensors():
            take_part(own[name], whole)
        return program

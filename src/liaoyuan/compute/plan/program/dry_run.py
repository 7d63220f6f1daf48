"""A step of the training program itself, of one process among any number, without memory, cards or network.

The model is laid out, the optimiser made and a step taken by the code that trains; only what tensors hold and what
travels is missing. So a prediction cannot drift from the program. Collectives go nowhere (PyTorch's "fake" back end).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from liaoyuan.compute.plan.program.actions import marking
from liaoyuan.compute.plan.program.hollow import Hollow
from liaoyuan.compute.plan.program.trace import Recorder, Trace
from liaoyuan.data import Batch
from liaoyuan.device import Device, DType
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.ops.choice import operators_called
from liaoyuan.parallel import Layout, Program, World
from liaoyuan.parallel.layout import Shape, resolve
from liaoyuan.parallel.program import give_memory, take_apart
from liaoyuan.training.flops import TRAINING
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from liaoyuan.training.optimiser import Optimiser

BF16 = torch.bfloat16


class Planned(Device):
    """A device that is planned for: the program decides as on that kind, and its tensors are hollow ones of the CPU."""

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")

    @property
    def default_dtype(self) -> DType:
        return super().default_dtype if self.is_cpu else BF16


@dataclass(frozen=True)
class Job:
    """A training run as far as its cost goes. `train.batch_tokens` are those of a step, over all processes.

    device: the kind that it runs on, as torch calls it.
    """

    model: ModelConfig
    layout: Layout
    processes: int
    sequence_length: int
    train: TrainConfig
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.train.batch_tokens // self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all processes."""
        return self.rows * self.sequence_length

    @property
    def flops(self) -> float:
        """Model FLOPs of a step, over all processes (`training.flops`): causal attention, nothing computed again."""
        return TRAINING * self.tokens * self.model.flops_per_token((self.sequence_length + 1) / 2)

    @property
    def shape(self) -> Shape:
        """What a layout of it must fit."""
        return Shape(self.model, self.sequence_length, self.rows, self.train.microbatches)

    @property
    def resolved(self) -> Layout:
        """The layout with every axis filled in; raises LiaoyuanError if it does not fit."""
        return resolve(self.layout, self.processes, self.shape)


def dry_run(job: Job, rank: int = 0, steps: int = 2) -> Trace:
    """Return what process `rank` does in the last of `steps` steps; the first makes what later ones keep.

    One step alone is preceded by an update with no gradients, which makes the optimiser's state.

    Raises:
        LiaoyuanError: the layout does not fit the job.
    """
    with alone_among(job.processes, rank), operators_called():
        world = World(rank, job.processes, Planned(job.device)).arrange(job.resolved)
        with torch.device("meta"):
            model = Decoder(job.model).to(job.model.torch_dtype)
        program = take_apart(model, job.resolved, world)
        with Hollow():
            give_memory(program, world.device.torch)
            with Recorder(program) as recorder:
                return _steps(job, program, world, recorder, steps)


def _steps(job: Job, program: Program, world: World, recorder: Recorder, steps: int) -> Trace:
    optimiser = make_optimiser(program, job.train, world)
    batches = [empty_batch(job, world) for _ in range(job.train.microbatches)]
    if steps == 1:
        _update(program, optimiser)
    with marking(recorder, optimiser):
        for _ in range(steps):
            recorder.restart()
            take_step(program, optimiser, batches, job.train.learning_rate, job.train.clip, world)
    return recorder.finish()


def _update(program: Program, optimiser: Optimiser) -> None:
    for _, weight in program.named_parameters():
        weight.grad = torch.zeros_like(weight)
    optimiser.step(0.0)


def empty_batch(job: Job, world: World) -> Batch:
    """Return a microbatch of one data rank whose documents are whole rows."""
    count = job.rows // world.data_size // job.train.microbatches
    length = job.sequence_length
    positions = torch.arange(length).repeat(count)
    tokens = torch.zeros(count * length, dtype=torch.int64)
    boundaries = torch.arange(0, (count + 1) * length, length, dtype=torch.int32)
    return Batch(tokens, positions, tokens, torch.ones(len(tokens)), boundaries)


@contextmanager
def alone_among(processes: int, rank: int) -> Iterator[None]:
    """Be process `rank` of so many of which no other exists."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()

"""The parts of a step as it runs: which microbatch is computed when, of which stage, and when the weights are updated.

Marks are set where PyTorch's pipelines call a stage, and where the program takes gradients away between microbatches.
They cut a trace into actions: `Action` is one, and `orders` says in which order each process of a pipeline takes them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.pipelining.stage import _PipelineStageBase

from liaoyuan.compute.plan.program.trace import Recorder
from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.pipeline import MULTI, stage_numbers
from liaoyuan.training.optimiser import Optimiser

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "input", "weight"
KINDS = {"FORWARD": FORWARD, "FULL_BACKWARD": BACKWARD, "BACKWARD_INPUT": INPUT, "BACKWARD_WEIGHT": WEIGHT}  # PyTorch's
MICROBATCH, REDUCE, OPTIMISER = "microbatch", "reduce", "optimiser"  # further marks


class Action(NamedTuple):
    """One pass of a microbatch through a stage: forward, backward, or one half of backward: its input's, its weights'.

    As the name of a mark it is written "forward 3 0": kind, stage, microbatch. (A trace has marks of phases, too.)
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} {self.stage} {self.microbatch}"

    @staticmethod
    def parse(name: str) -> "Action | None":
        """Return the action of a mark, None if it is another mark."""
        kind, *numbers = name.split()
        return Action(kind, int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else None


@contextmanager
def marking(recorder: Recorder, optimiser: Optimiser) -> Iterator[None]:
    """Set marks in the recorder's trace while the context lasts."""
    real: dict[tuple[Any, str], Any] = {}

    def put(owner: Any, name: str, note: Callable[..., str], after: bool = False) -> None:
        function = real[owner, name] = getattr(owner, name)

        def noting(*inputs: Any, **named: Any) -> Any:
            if not after:
                recorder.mark(note(*inputs, **named))
            out = function(*inputs, **named)
            if after:
                recorder.mark(note(*inputs, **named))
            return out

        setattr(owner, name, noting)

    put(
        _PipelineStageBase, "forward_one_chunk", lambda stage, chunk, *_, **__: f"{FORWARD} {stage.stage_index} {chunk}"
    )
    put(_PipelineStageBase, "backward_one_chunk", _backward)
    put(_PipelineStageBase, "backward_weight_one_chunk", _weight)
    put(_PipelineStageBase, "perform_reduce_grad", lambda *_, **__: REDUCE)
    put(optimiser, "accumulate", lambda: MICROBATCH, after=True)
    put(optimiser, "step", lambda *_, **__: OPTIMISER)
    try:
        yield
    finally:
        for (owner, name), function in real.items():
            setattr(owner, name, function)


def _forward(stage: Any, chunk: int, *_: Any, **__: Any) -> str:
    return f"{FORWARD} {stage.stage_index} {chunk}"


def _backward(stage: Any, chunk: int, loss: Any = None, full_backward: bool = True, **_: Any) -> str:
    return f"{BACKWARD if full_backward else INPUT} {stage.stage_index} {chunk}"


def _weight(stage: Any, chunk: int, last_backward: bool = False) -> str:
    return f"{WEIGHT} {stage.stage_index} {chunk}"


@lru_cache(maxsize=64)
def orders(layout: Layout, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return for each process of the pipeline its actions in the order in which PyTorch's schedule takes them."""
    if layout.schedule in MULTI:
        return tuple(map(tuple, _several(layout, microbatches)))
    return tuple(tuple(_one(layout, rank, microbatches)) for rank in range(layout.pp))


def _one(layout: Layout, rank: int, microbatches: int) -> Iterator[Action]:
    """Yield the actions of a process that has one stage: GPipe, or 1F1B, whose order PyTorch writes as a program."""
    ahead = microbatches if layout.schedule == "gpipe" else min(microbatches, layout.pp - rank)
    for number in range(ahead):
        yield Action(FORWARD, rank, number)
    for number in range(microbatches):
        yield Action(BACKWARD, rank, number)
        if ahead + number < microbatches:
            yield Action(FORWARD, rank, ahead + number)


def _several(layout: Layout, microbatches: int) -> Iterator[list[Action]]:
    """Yield the actions of each process from the schedule object itself, made for stages that compute nothing."""
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=layout.stages,
            group_size=layout.pp,
            group_rank=0,
            is_first=number == 0,
            is_last=number == layout.stages - 1,
            submod=nn.Module(),
        )
        for number in stage_numbers(layout, 0)
    ]
    from torch.distributed.pipelining import schedules  # slow to import

    made: Any = getattr(schedules, MULTI[layout.schedule])(stages, microbatches, scale_grads=False)
    for rank in range(layout.pp):
        known = [action for action in made.pipeline_order[rank] if action is not None]
        flat = [part for action in known for part in action.sub_actions or (action,)]
        yield [Action(KINDS[part.computation_type.name], part.stage_index, part.microbatch_index) for part in flat]

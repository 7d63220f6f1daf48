"""A parallel layout is data: how many processes along each axis, checked before anything starts.

Processes are numbered with pipeline stages outermost and tensor parallelism innermost, so that those who talk most
are nearest: [pp, dp, fsdp, ring, ulysses, tp]. Experts see the same processes as [pp, dp, rest, ep].
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import ModelConfig

Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]
STAGES_PER_PROCESS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}


class ContextParallel(Config):
    """How many processes share one sequence: Ulysses (heads change place with tokens) times ring (keys go round)."""

    ulysses: int = Field(1, gt=0)
    ring: int = Field(1, gt=0)


class Layout(Config):
    """The section `[layout]` of a run file."""

    dp: int = Field(1, gt=0)  # replicas of the sharded model (hybrid sharding)
    fsdp: int = Field(0, ge=0)  # processes over which weights are sharded; 0: all that the other axes leave
    tp: int = Field(1, gt=0)  # tensor and sequence parallel
    cp: ContextParallel = ContextParallel()
    pp: int = Field(1, gt=0)  # pipeline stages, or pairs of them
    schedule: Schedule = "1f1b"
    ep: int = Field(1, gt=0)  # processes over which experts are spread; they are those of fsdp, cp and tp
    overlap: bool = True  # compute while weights, tokens and rows of experts travel
    recompute: Literal["none", "selective", "full"] = "none"  # activations that the backward pass computes again
    recompute_every: int = Field(1, gt=0)  # of the layers, which ones
    compile: bool = False  # torch.compile of each layer (not with tp, cp or ep, nor with experts)
    exact: bool = False  # training and inference under the same tp give a token the same bits (not with pp or cp)

    @property
    def context(self) -> int:
        """Processes that share one sequence."""
        return self.cp.ulysses * self.cp.ring

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * STAGES_PER_PROCESS[self.schedule] if self.pp > 1 else 1

    def describe(self) -> str:
        """Return the axes that are used, e.g. "fsdp 2 x tp 2"."""
        axes = {
            "pp": self.pp,
            "dp": self.dp,
            "fsdp": self.fsdp,
            "ring": self.cp.ring,
            "ulysses": self.cp.ulysses,
            "tp": self.tp,
        }
        used = [f"{name} {size}" for name, size in axes.items() if size > 1]
        text = " x ".join(used) or "one process"
        return text + (f" (experts over {self.ep})" if self.ep > 1 else "")


@dataclass(frozen=True)
class Shape:
    """What of a run a layout must fit: the model, tokens of a row, rows and microbatches of a step."""

    model: ModelConfig
    sequence_length: int
    rows: int
    microbatches: int = 1


def resolve(layout: Layout, processes: int, shape: Shape) -> Layout:
    """Return the layout with `fsdp` filled in.

    Raises:
        LiaoyuanError: it is illegal for these processes or this shape; the sentence has the reason and the nearest
            legal layout.
    """
    filled, reason = _fill(layout, processes)
    reason = reason or objection(filled, processes, shape)
    if reason is None:
        return filled
    near = _nearest(filled, processes, shape)
    advice = f" The nearest layout that fits: {near.describe()}." if near else ""
    raise LiaoyuanError(f"The layout {filled.describe()} does not fit: {reason}.{advice}")


def _fill(layout: Layout, processes: int) -> tuple[Layout, str | None]:
    if layout.fsdp:
        return layout, None
    others = layout.pp * layout.dp * layout.context * layout.tp
    filled = layout.model_copy(update={"fsdp": max(1, processes // others)})
    if processes % others:
        return filled, f"{others} processes of the other axes do not divide the {processes} that there are"
    return filled, None


def objection(layout: Layout, processes: int, shape: Shape) -> str | None:
    """Return why a layout with every axis filled in is illegal, or None."""
    model = shape.model
    total = layout.pp * layout.dp * layout.fsdp * layout.context * layout.tp
    tokens = shape.sequence_length * shape.rows // max(1, layout.dp * layout.fsdp * shape.microbatches)
    cut = layout.cp.ulysses * layout.tp * (2 * layout.cp.ring if layout.cp.ring > 1 else 1)
    checks = [
        (total != processes, f"its axes make {total} processes, but there are {processes}"),
        (
            layout.exact and (layout.pp * layout.context > 1 or layout.compile),
            "exact is for the axes dp, fsdp, tp and ep: without pp, cp and compile",
        ),
        (
            shape.rows % (layout.dp * layout.fsdp * shape.microbatches) != 0,
            f"the {shape.rows} rows of a batch cannot be divided into {shape.microbatches} microbatches on each of "
            f"{layout.dp * layout.fsdp} data-parallel processes",
        ),
        (tokens % cut != 0, f"the {tokens} tokens of a microbatch cannot be cut into {cut} equal pieces"),
        (
            model.num_key_value_heads % layout.tp != 0,
            f"tp = {layout.tp} does not divide the {model.num_key_value_heads} key-value heads",
        ),
        (model.intermediate_size % layout.tp != 0, f"tp does not divide intermediate_size {model.intermediate_size}"),
        (model.vocab_size % layout.tp != 0, f"tp = {layout.tp} does not divide the {model.vocab_size} tokens known"),
        (
            model.num_attention_heads // layout.tp % layout.cp.ulysses != 0,
            f"ulysses = {layout.cp.ulysses} does not divide the {model.num_attention_heads // layout.tp} heads",
        ),
        (
            layout.stages > model.num_hidden_layers,
            f"{layout.stages} pipeline stages are more than the {model.num_hidden_layers} layers",
        ),
        (
            layout.pp > 1 and shape.microbatches < fewest_microbatches(layout),
            f"the schedule {layout.schedule} needs at least {fewest_microbatches(layout)} microbatches "
            f"(train.microbatches is {shape.microbatches})",
        ),
        (
            layout.pp > 1 and layout.schedule == "interleaved" and shape.microbatches % layout.pp != 0,
            f"the schedule interleaved needs a number of microbatches that pp = {layout.pp} divides",
        ),
        (
            layout.compile and (layout.tp * layout.context * layout.ep > 1 or model.experts is not None),
            "compile works for whole dense layers: without experts, tp, cp and ep",
        ),
        *_expert_checks(layout, model),
    ]
    return next((reason for wrong, reason in checks if wrong), None)


def _expert_checks(layout: Layout, model: ModelConfig) -> list[tuple[bool, str]]:
    if layout.ep == 1:
        return []
    if model.experts is None:
        return [(True, "ep is set, but the model has no experts")]
    shared = layout.fsdp * layout.context * layout.tp
    return [
        (shared % layout.ep != 0, f"ep = {layout.ep} does not divide the {shared} processes of fsdp, cp and tp"),
        (
            model.experts.num_experts % layout.ep != 0,
            f"ep = {layout.ep} does not divide the {model.experts.num_experts} experts",
        ),
    ]


def fewest_microbatches(layout: Layout) -> int:
    """A schedule with V-shaped stages begins with so many microbatches that all stages have work."""
    return 2 * layout.pp if layout.schedule in ("zbv", "dualpipev") else layout.pp


def _nearest(layout: Layout, processes: int, shape: Shape) -> Layout | None:
    """Return the legal layout that differs in the fewest axes, and in those the least."""
    best, least = None, (math.inf, math.inf)
    for tp, ulysses, ring, pp, dp, fsdp in _factorisations(processes, 6):
        for ep in divisors(fsdp * ulysses * ring * tp) if shape.model.experts else [1]:
            cp = ContextParallel.model_construct(ulysses=ulysses, ring=ring)
            update = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep, "fsdp": fsdp}
            candidate = layout.model_copy(update=update)
            distance = _distance(candidate, layout)
            if distance < least and objection(candidate, processes, shape) is None:
                best, least = candidate, distance
    return best


def _factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write `number` as a product of so many factors in order."""
    if factors == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in _factorisations(number // first, factors - 1):
            yield first, *rest


@functools.cache
def divisors(number: int) -> list[int]:
    """Return all numbers that divide `number`, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _distance(one: Layout, other: Layout) -> tuple[int, float]:
    def axes(layout: Layout) -> tuple[int, ...]:
        return layout.tp, layout.cp.ulysses, layout.cp.ring, layout.pp, layout.dp, layout.ep

    pairs = [(a, b) for a, b in zip(axes(one), axes(other), strict=True) if a != b]
    return len(pairs), sum(max(a / b, b / a) for a, b in pairs)

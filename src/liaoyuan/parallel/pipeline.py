"""Pipeline parallelism: stages of layers on different processes, microbatches flowing through them.

The schedules are PyTorch's: GPipe, 1F1B (Narayanan et al. 2021, arXiv 2104.04473), its interleaved form, ZBV (Qi et
al. 2023, arXiv 2401.10241) and DualPipeV (DeepSeek-AI 2024, arXiv 2412.19437). In the last two a process holds one
stage of each arm of a V.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from liaoyuan.models import AttentionContext, Decoder, ModelConfig
from liaoyuan.models.layers import Linear
from liaoyuan.ops import Penalties, wide
from liaoyuan.parallel.layout import STAGES_PER_PROCESS, Layout, fewest_microbatches
from liaoyuan.parallel.mesh import Mesh

if TYPE_CHECKING:  # torch's pipelines import its whole compiler: a second at every start, for the few that need it
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

HEAD = "lm_head.weight"  # a tied model has it in its last stage only, as a copy: see tied.py
SINGLE = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}  # schedules of one stage a process, by torch's names
MULTI = {"interleaved": "ScheduleInterleaved1F1B", "zbv": "ScheduleZBVZeroBubble", "dualpipev": "ScheduleDualPipeV"}


def stage_numbers(layout: Layout, rank: int) -> list[int]:
    """Return the numbers of the stages that process `rank` of the pipeline holds."""
    if layout.schedule in ("zbv", "dualpipev"):
        return [rank, 2 * layout.pp - 1 - rank]
    return [rank + n * layout.pp for n in range(STAGES_PER_PROCESS[layout.schedule])]


def process_of(layout: Layout, stage: int) -> int:
    """Return which process of the pipeline holds a stage."""
    return next(rank for rank in range(layout.pp) if stage in stage_numbers(layout, rank))


def stage_with(name: str, layers: Sequence[range]) -> int:
    """Return the number of the stage that holds the weight `name`."""
    match = re.match(r"layers\.(\d+)\.", name)
    if match:
        return next(number for number, own in enumerate(layers) if int(match[1]) in own)
    return 0 if name.startswith("embed_tokens.") else len(layers) - 1


def cut_layers(config: ModelConfig, stages: int) -> list[range]:
    """Return each stage's layers, contiguous, so that the most expensive stage is as cheap as can be.

    Cost is that of matrix products per token, the last stage's head included.
    """
    return list(_cut_layers(config, stages))


@functools.cache
def _cut_layers(config: ModelConfig, stages: int) -> tuple[range, ...]:
    costs = [config.layer_products(layer) for layer in range(config.num_hidden_layers)]
    head = 2.0 * config.vocab_size * config.hidden_size
    return tuple(_cut([*costs[:-1], costs[-1] + head], stages))


def _cut(costs: Sequence[float], stages: int) -> list[range]:
    """Split the costs into `stages` non-empty stretches with the smallest possible largest sum."""
    count = len(costs)
    sums = [0.0, *torch.tensor(costs, dtype=torch.float64).cumsum(0).tolist()]
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            begins = [begin for begin in range(stage - 1, end) if (stage - 1, begin) in best]
            options = [(max(best[stage - 1, begin][0], sums[end] - sums[begin]), begin) for begin in begins]
            best[stage, end] = min(options)
    cuts, end = [], count
    for stage in range(stages, 0, -1):
        begin = best[stage, end][1]
        cuts.append(range(begin, end))
        end = begin
    return cuts[::-1]


def stage_of(model: Decoder, number: int, layers: Sequence[range]) -> Decoder:
    """Return a decoder with what of `model` is in stage `number` alone, under the same names and in the same memory.

    The head of a tied model is a copy of its embedding.
    """
    stage = copy.copy(model)
    absent = {"embed_tokens"} if number > 0 else set()
    absent |= {"norm", "lm_head"} if number < len(layers) - 1 else set()
    stage._modules = {name: part for name, part in model._modules.items() if name not in absent}
    if number == len(layers) - 1 and model.config.tie_word_embeddings:
        stage.lm_head = Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta")
        stage.lm_head.weight = copy.deepcopy(model.embed_tokens.weight)
    stage.layers = copy.copy(model.layers)
    stage.layers._modules = {str(index): model.layers[index] for index in layers[number]}
    return stage


class Stage(nn.Module):
    """One stage as PyTorch's schedules call it: the first takes tokens, the last gives log-probabilities, and penalties
    if they are wanted.
    """

    def __init__(self, decoder: Decoder, context: Callable[[Tensor], AttentionContext]) -> None:
        super().__init__()
        self.decoder, self.context = decoder, context
        self.penalties: Penalties | None = None
        self.is_first, self.is_last = hasattr(decoder, "embed_tokens"), hasattr(decoder, "norm")

    def forward(self, x: Tensor, positions: Tensor, targets: Tensor, boundaries: Tensor) -> Tensor:
        """x: int64 [1, n] tokens or [n, H] residual stream; positions, targets: int64 [1, n]; boundaries [1, M + 1]."""
        model = self.decoder
        residual = model.embed_tokens(x[0]) if self.is_first else x
        residual, addend = model.run_layers(residual, positions[0], self.context(boundaries[0]))
        if not self.is_last:
            return residual + addend
        _, hidden = model.norm.add(residual, addend)
        return model.score(hidden, targets[0], self.penalties)


class Pipeline:
    """The stages of this process and their schedule, made anew when the shape of a microbatch changes."""

    def __init__(self, stages: Sequence[Stage], mesh: Mesh) -> None:
        self.stages, self.mesh = list(stages), mesh
        self._schedules: dict[tuple[int, int, bool], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._losses: list[Tensor] = []

    def run(
        self, inputs: dict[str, Tensor], weights: Tensor, learn: bool, penalties: Penalties | None = None
    ) -> list[Tensor]:
        """Pass microbatches through all stages, and back if `learn`.

        Args:
            inputs: tokens, positions, targets int64 [M, n] and boundaries [M, K] of this process's rows.
            weights: [M, n] of the loss, scaled as the gradient shall be.
            penalties: what the loss adds for each token.

        Returns:
            `losses_of` each microbatch, where this process has the last stage; else nothing.
        """
        for stage in self.stages:
            stage.penalties = penalties
        microbatches, rows = inputs["tokens"].shape
        schedule: Any = self._schedule(microbatches, rows, penalties is not None)
        rest = {name: x for name, x in inputs.items() if name != "tokens"}
        self._losses = []
        first = [inputs["tokens"]] if any(stage.is_first for stage in self.stages) else []
        wanted: dict[str, Any] = {"target": weights, "losses": []} if self.has_loss else {}
        if learn:
            schedule.step(*first, **rest, **wanted)
        else:
            with _forward_alone(schedule):
                schedule.eval(*first, **rest, **wanted)
        return self._losses

    def _loss(self, scores: Tensor, weights: Tensor) -> Tensor:
        losses = losses_of(scores, weights[0])
        self._losses.append(losses.detach())
        return losses.sum()

    @property
    def fewest(self) -> int:
        """How few microbatches the schedule can do with."""
        return fewest_microbatches(self.mesh.layout)

    @property
    def has_loss(self) -> bool:
        return any(stage.is_last for stage in self.stages)

    def _schedule(
        self, microbatches: int, rows: int, penalties: bool
    ) -> "PipelineScheduleSingle | PipelineScheduleMulti":
        from torch.distributed.pipelining import schedules

        if (microbatches, rows, penalties) not in self._schedules:
            layout = self.mesh.layout
            numbers = stage_numbers(layout, self.mesh.place("pp"))
            parts = [self._stage(stage, n, rows, penalties) for n, stage in zip(numbers, self.stages, strict=True)]
            settings: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
            if layout.schedule in SINGLE:
                made: Any = getattr(schedules, SINGLE[layout.schedule])(parts[0], microbatches, **settings)
            else:
                made = getattr(schedules, MULTI[layout.schedule])([*parts], microbatches, **settings)
            self._schedules[microbatches, rows, penalties] = made
        return self._schedules[microbatches, rows, penalties]

    def _stage(self, stage: Stage, number: int, rows: int, penalties: bool) -> "PipelineStage":
        from torch.distributed.pipelining import PipelineStage

        weight = next(stage.parameters())
        config, layout = stage.decoder.config, self.mesh.layout
        stream = torch.empty(rows // layout.tp, config.hidden_size, dtype=weight.dtype, device="meta")
        tokens = torch.empty(1, rows, dtype=torch.int64, device="meta")
        scores = torch.empty((2, rows) if penalties else rows, dtype=wide(weight[:0]).dtype, device="meta")
        return PipelineStage(
            stage,
            number,
            layout.stages,
            weight.device,
            input_args=tokens if stage.is_first else stream.requires_grad_(),
            output_args=(scores if stage.is_last else stream).requires_grad_(),
            group=self.mesh.group("pp"),
        )


@contextmanager
def _forward_alone(schedule: Any) -> Iterator[None]:
    """Take what belongs to the backward pass out of a schedule; PyTorch leaves it in when it evaluates."""
    orders = getattr(schedule, "pipeline_order_with_comms", None)
    if orders is None:
        yield
        return
    kinds = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
    schedule.pipeline_order_with_comms = {
        rank: [part for action in order for part in action.sub_actions or (action,) if part.computation_type in kinds]
        for rank, order in orders.items()
    }
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = orders


def losses_of(scores: Tensor, weights: Tensor) -> Tensor:
    """Return a microbatch's cross-entropy, a scalar; or, of scores [2, N] with penalties, both, [2]; their sum is the
    loss.

    weights: [N], scaled as the gradient shall be.
    """
    if scores.dim() == 1:
        return -(weights * scores).sum()
    return torch.stack((-(weights * scores[0]).sum(), (weights * scores[1]).sum()))

"""A model laid out over processes: what training asks of it, whatever the layout.

The order in which a layout is applied is fixed: stages are cut first, then tensor parallel, then expert parallel, then
recomputation, compiling, and FSDP last, over what the others left.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liaoyuan.data import Batch
from liaoyuan.models import AttentionContext, Decoder, ModelConfig, PackedContext, initial_weights
from liaoyuan.models.experts import Router
from liaoyuan.ops import Penalties
from liaoyuan.parallel.context import SharedContext, own_rows
from liaoyuan.parallel.expert import apply_expert_parallel, balance, expert_weights
from liaoyuan.parallel.fsdp import apply_fsdp, full_weights, local, own_block, reshard
from liaoyuan.parallel.layout import Layout
from liaoyuan.parallel.mesh import Mesh
from liaoyuan.parallel.pipeline import (
    HEAD,
    Pipeline,
    Stage,
    cut_layers,
    losses_of,
    process_of,
    stage_numbers,
    stage_of,
    stage_with,
)
from liaoyuan.parallel.placed_experts import PlacedExperts
from liaoyuan.parallel.quantised import Forms
from liaoyuan.parallel.recompute import apply_recompute
from liaoyuan.parallel.reduction import Reduction
from liaoyuan.parallel.tensor import apply_tensor_parallel, compute_locally, sum_uncut
from liaoyuan.parallel.tied import TiedEnds
from liaoyuan.parallel.world import World

# A loss other than the cross-entropy of a microbatch: (log-probabilities fp32 [N], microbatch) -> [1 + K], the loss,
# which has the gradient, and K values that have none; all are sums.
Losses = Callable[[Tensor, Batch], Tensor]
SCORED_ROWS = 512  # whose logits are in memory at once where the most probable tokens are asked for


class Program:
    """A model over the processes of a mesh (None: whole, in this process).

    models: the stages of this process, as a rule one. Their weights are DTensors; names are those of the whole model.
    """

    def __init__(self, models: Sequence[Decoder], mesh: Mesh | None = None, pipeline: Pipeline | None = None) -> None:
        self.models, self.mesh, self.pipeline = list(models), mesh, pipeline
        self.reductions: list[Reduction] = []  # one for each stage, on devices that need them
        self.placed: PlacedExperts | None = None  # for inference, where experts lie in slots
        self.few_bits: Forms = {}  # for inference: the projections whose weights are quantised

    @property
    def config(self) -> ModelConfig:
        return self.models[0].config

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this process's weights with their names in the whole model."""
        for model in self.models:
            yield from self._known(model.named_parameters())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield weights and persistent buffers: all that a model folder holds.

        Of experts in slots that have moved they hold others than those they stand for; see `PlacedExperts.in_order`.
        """
        for model in self.models:
            for name, tensor in self._known(model.state_dict().items()):
                yield name, self.placed.in_order(name, tensor) if self.placed else tensor

    def _known(self, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Leave out the copy of a tied embedding that the last stage of a pipeline computes with."""
        return ((name, value) for name, value in named if not (name == HEAD and self.config.tie_word_embeddings))

    def initialise(self, seed: int) -> "Program":
        """Fill the weights as `models.initialise` does, drawing whole tensors one by one and keeping one's own part."""
        own = dict(self.named_parameters())
        for name, value in initial_weights(self.config, seed):
            if name in own:
                take_part(own[name], value)
        with torch.no_grad():
            for buffer in (buffer for model in self.models for buffer in model.buffers()):
                buffer.zero_()
        return self

    def whole_tensors(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight and persistent buffer whole, in every process; all must go through all of them.

        `tensors` are others of the same names and shapes, such as gradients.
        """
        own = dict(self.named_tensors()) if tensors is None else tensors
        if not self.pipeline:
            yield from full_weights(own.items())
            return
        layers = cut_layers(self.config, self.pipeline.mesh.layout.stages)
        with torch.device("meta"):
            whole = Decoder(self.config)
        buffers = {name for name, _ in whole.named_buffers()}
        dtype = next(self.models[0].parameters()).dtype
        for name, like in whole.state_dict().items():
            found = next(iter(full_weights([(name, own[name])])))[1] if name in own else None
            like = like.to(torch.float32 if name in buffers else dtype)
            yield name, self._from_stage(stage_with(name, layers), found, like)

    def _from_stage(self, stage: int, found: Tensor | None, like: Tensor) -> Tensor:
        """Return in every process of the pipeline the tensor that the one with `stage` has found, of this form."""
        assert self.mesh
        group = self.mesh.group("pp")
        whole = torch.empty_like(like, device=self.device) if found is None else found.to(like.dtype).contiguous()
        dist.broadcast(whole, dist.get_global_rank(group, process_of(self.mesh.layout, stage)), group=group)
        return whole

    def routers(self) -> list[Router]:
        """Return the routers of this process's mixtures of experts."""
        return [module for model in self.models for module in model.modules() if isinstance(module, Router)]

    def balance(self, rate: float) -> dict[str, float]:
        """Balance the load of this process's experts and return how uneven it was; see `expert.balance`."""
        worst = balance(self.routers(), rate, self._sum_of_stage)
        if self.pipeline and self.config.experts:  # the worst of all stages
            value = torch.tensor(worst, device=self.device)
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.pipeline.mesh.group("pp"))
            worst = float(value)
        return {"expert_load_max": worst} if self.config.experts else {}

    def _sum_of_stage(self, x: Tensor) -> Tensor:
        if self.mesh:
            dist.all_reduce(x, group=self.mesh.stage)
        return x

    def train(self, mode: bool = True) -> "Program":
        """Switch between training and evaluation, as `nn.Module.train` does."""
        for model in self.models:
            model.train(mode)
        return self

    def eval(self) -> "Program":
        """Switch to evaluation."""
        return self.train(False)

    def backward(
        self,
        batches: Sequence[Batch],
        scale: float,
        take: Callable[[], None] | None = None,
        penalties: Penalties | None = None,
        losses: Losses | None = None,
    ) -> Tensor:
        """Compute the gradients of the microbatches' summed loss times `scale`; return that loss, this process's
        share of it.

        With `penalties` the loss is the cross-entropy and they; the two are returned apart, [2]. With `losses` it is
        another one, and all of them are returned times `scale`, [1 + K].

        `take` takes the gradients away after each microbatch if there are several, to add them up elsewhere, in
        another precision. Without it they add up in place, and so they do in a pipeline.

        Raises:
            ValueError: weights have gradients of an earlier pass, to which those that are still under way when FSDP
                hands them over would be added; or `losses` are given in a layout that cuts documents or layers.
        """
        if any(weight.grad is not None for _, weight in self.named_parameters()):
            raise ValueError("the weights have gradients of an earlier pass: take or drop them first")
        self._check(losses)
        if self.pipeline:
            return self._pass(batches, scale, True, penalties)
        total, sums = self._nothing(penalties), GradientSums(self.named_parameters())
        for batch in batches:
            found = self._losses(batch, scale, penalties, losses)
            found.sum().backward()
            total = total + self._counted(found.detach())
            self._finish_gradients()
            if len(batches) > 1:
                (take or sums.take)()
        sums.give_back()
        return total

    def _finish_gradients(self) -> None:
        """Wait for what is still under way after a backward pass, and add up what tensor parallelism left apart."""
        for reduction in self.reductions:
            reduction.finish()
        if self.mesh and self.mesh.layout.tp > 1:
            sum_uncut(self.named_parameters(), self.mesh.group("tp"))

    @torch.no_grad()
    def loss(self, batch: Batch, scale: float = 1.0, losses: Losses | None = None) -> Tensor:
        """Return this process's share of the microbatch's summed loss, or `losses`, times `scale`."""
        self._check(losses)
        if self.pipeline:
            return self._pass([batch], scale, learn=False)
        loss = self._counted(self._losses(batch, scale, None, losses))
        reshard(self.models)
        return loss

    @torch.no_grad()
    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return of each token of a microbatch the log-probability of its target, fp32 [N], and whether no other token
        is more probable, bool [N]. For layouts that cut no layer, no vocabulary and no sequence (`dp` and `fsdp`).
        """
        (model,) = self.models
        x = self._own(batch)
        context = self.context(batch.boundaries, len(batch.tokens))
        hidden = model(x["tokens"], x["positions"], context, hidden=True)
        log_probs = model.score(hidden, x["targets"])
        first = torch.cat([model.logits(rows).argmax(-1) for rows in hidden.split(SCORED_ROWS)])
        reshard(self.models)
        return log_probs, first == x["targets"]

    def _losses(
        self, batch: Batch, scale: float, penalties: Penalties | None = None, losses: Losses | None = None
    ) -> Tensor:
        (model,) = self.models
        x = self._own(batch)
        context = self.context(batch.boundaries, len(batch.tokens))
        scores = model(x["tokens"], x["positions"], context, x["targets"], penalties=penalties)
        return losses(scores, batch) * scale if losses else losses_of(scores, x["weights"] * scale)

    def _check(self, losses: Losses | None) -> None:
        if losses and (self.pipeline or (self.mesh and self.mesh.layout.context > 1)):
            raise ValueError("losses of whole documents need layouts that cut neither documents (cp) nor layers (pp)")

    def _nothing(self, penalties: Penalties | None) -> Tensor:
        return torch.zeros(() if penalties is None else 2, device=self.device)

    def _pass(self, batches: Sequence[Batch], scale: float, learn: bool, penalties: Penalties | None = None) -> Tensor:
        assert self.pipeline
        if not learn:  # a schedule wants its number of microbatches: the others weigh nothing
            batches = [*batches] * self.pipeline.fewest
        own = [self._own(batch) for batch in batches]
        inputs = {name: torch.stack([x[name] for x in own]) for name in ("tokens", "positions", "targets")}
        inputs["boundaries"] = torch.stack([batch.boundaries for batch in batches])
        weights = torch.stack([x["weights"] for x in own]) * scale
        ends = TiedEnds(self.models, self.pipeline.mesh) if self.config.tie_word_embeddings else None
        if ends:
            ends.bring()
        losses = self.pipeline.run(inputs, weights, learn, penalties)
        if learn:
            self._finish_gradients()
        if ends and learn:
            ends.take_back()
        total = torch.stack(losses).sum(0) if losses else self._nothing(penalties)
        return self._counted(total if learn else total / len(batches))

    def _own(self, batch: Batch) -> dict[str, Tensor]:
        """Return this process's rows of a microbatch, on its device."""
        names = ("tokens", "positions", "targets", "weights")
        values = {name: getattr(batch, name) for name in names}
        if self.mesh and self.mesh.layout.context > 1:
            rows = own_rows(len(batch.tokens), self.mesh)
            values = {name: x[rows] for name, x in values.items()}
        return {name: x.to(self.device) for name, x in values.items()}

    def context(self, boundaries: Tensor, tokens: int) -> AttentionContext:
        """Return the attention context of a microbatch."""
        if self.mesh and self.mesh.layout.context > 1:
            return SharedContext(boundaries, tokens, self.mesh)
        return PackedContext(boundaries.to(self.device))

    def _counted(self, loss: Tensor) -> Tensor:
        """Return the loss if this process is the one of those with the same rows that counts it, else zero."""
        return loss * float(self.mesh is None or self.mesh.place("tp") == 0)


class GradientSums:
    """Gradients of several microbatches, added up in their own precision."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._weights = [weight for _, weight in parameters]
        self._sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Take the gradients away from the weights."""
        for weight in self._weights:
            if weight.grad is None:
                continue
            if weight in self._sums:
                local(self._sums[weight]).add_(local(weight.grad))
            else:
                self._sums[weight] = weight.grad
            weight.grad = None

    def give_back(self) -> None:
        """Give each weight its sum, if there is one."""
        for weight, total in self._sums.items():
            weight.grad = total


@torch.no_grad()
def take_part(own: Tensor, whole: Tensor) -> None:
    """Copy this process's part of a whole tensor into its own, which may be a DTensor."""
    for dim, (start, size) in enumerate(zip(*own_block(own), strict=True)):
        whole = whole.narrow(dim, start, size)
    local(own.detach()).copy_(whole)


def lay_out(model: Decoder, layout: Layout, world: World) -> Program:
    """Lay out `model` (the same weights in every process) over the processes of `world`; it is taken apart.

    A model on the meta device gets memory on the world's device for this process's part alone: its weights hold
    nothing yet, to be filled by `Program.initialise` or `checkpoint.load_weights`.

    `world` must know the layout (`World.arrange`). One process: nothing but recomputation and compiling is done.
    """
    is_meta = next(model.parameters()).is_meta
    program = take_apart(model, layout, world)
    if is_meta:
        give_memory(program, world.device.torch)
    return program


def take_apart(model: Decoder, layout: Layout, world: World) -> Program:
    """Lay out `model` as `lay_out` does, but leave it where it is: on the meta device it has no memory yet."""
    if world.mesh is None:
        apply_recompute(model, layout)
        _compile(model, layout)
        return Program([model])
    if layout.pp > 1:
        return _lay_out_stages(model, world.mesh)
    program = Program([model], world.mesh)
    _apply(program, model, model, world.mesh)
    return program


def give_memory(program: Program, device: torch.device) -> None:
    """Give a model on the meta device memory for this process's part."""
    roots: list[nn.Module] = [*program.pipeline.stages] if program.pipeline else [*program.models]
    for root in roots:
        root.to_empty(device=device)
        for buffer in root.buffers():
            buffer.zero_()


def _lay_out_stages(model: Decoder, mesh: Mesh) -> Program:
    layers = cut_layers(model.config, mesh.layout.stages)
    numbers = stage_numbers(mesh.layout, mesh.place("pp"))
    models = [stage_of(model, number, layers) for number in numbers]
    program = Program(models, mesh)
    stages = [Stage(part, lambda boundaries: program.context(boundaries, int(boundaries[-1]))) for part in models]
    for stage, part in zip(stages, models, strict=True):
        _apply(program, stage, part, mesh)
    program.pipeline = Pipeline(stages, mesh)
    return program


def _apply(program: Program, stage: nn.Module, model: Decoder, mesh: Mesh) -> None:
    layout = mesh.layout
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh)
    if layout.ep > 1:
        apply_expert_parallel(model, mesh)
    if layout.tp > 1 or layout.ep > 1:
        compute_each_locally(stage, model)
    apply_recompute(model, layout)
    _compile(model, layout)
    reduction = apply_fsdp(stage, model, mesh)
    program.reductions += [reduction] if reduction else []


def _compile(model: Decoder, layout: Layout) -> None:
    """Let `torch.compile` fuse what a layer does, if the layout says so; the first steps take the longer for it."""
    if layout.compile:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward)


def compute_each_locally(stage: nn.Module, model: Decoder) -> None:
    """Let each layer of `model`, its experts, and what `stage` has beside them compute with local parts of weights."""
    experts = expert_weights(model)
    for module in experts:
        compute_locally(module, "experts.")
    for number, layer in model.layers._modules.items():
        assert layer is not None
        compute_locally(layer, f"layers.{number}.", tuple(experts))
    compute_locally(stage, "", tuple(model.layers))

"""Two ways to run one forward and backward pass, compared operator by operator: where do they begin to differ?

Both run side by side (`ops.lockstep`), so the memory is that of the two models and their activations. Every operator
of this package is called by its registered name on both sides, whatever kernel computes it there.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from liaoyuan.compute.subject import open_model, some_batches
from liaoyuan.data import Batch, TokenStream
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.ops.choice import AUTO, REFERENCE, compute_with, operator_named, operators_called, status
from liaoyuan.ops.difference import NONE, Difference
from liaoyuan.ops.lockstep import LOOK_AHEAD, Pair, Seen, side_by_side
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Around, Call, Watch, tensors_in
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, local, own_block, resolve
from liaoyuan.parallel.layout import fewest_microbatches
from liaoyuan.parallel.simulated import simulate
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.training.pretrain import FREE_WORDS

TOLERANCE = {  # of the largest element; differences add up from operator to operator
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
MakeStream = Callable[[Decoder, Path | None, int, int], TokenStream]


@dataclass(frozen=True)
class Way:
    """One way to run a model: which, where, in which dtype (None: its own), with which kernels.

    kernels: operator -> kernel, with "" for all others; "auto" is what this machine uses.
    """

    folder: Path
    device: Device = field(default_factory=lambda: Device("cpu"))
    dtype: str | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise LiaoyuanError if it asks for an operator or a kernel that does not exist, or is not in use, there."""
        for name, kernel in self.kernels.items():
            asked = [operator_named(name)] if name else list(OPERATORS.values())
            there = {one.name for operator in asked for one in operator.kernels if self.device.type in one.devices}
            known = [AUTO, REFERENCE, *sorted(there)]
            if kernel not in known:
                of = f"The operator {name} has" if name else "There is"
                raise LiaoyuanError(f"{of} no kernel '{kernel}' on {self.device.type}: {', '.join(known)}.")
            self._refuse_unused(name, kernel)

    def _refuse_unused(self, name: str, kernel: str) -> None:
        """Raise LiaoyuanError if the reference would compute all that this kernel is asked for."""
        asked = [row for row in status(self.device.type) if name in ("", row.operator)]
        if kernel not in (AUTO, REFERENCE) and all(row.kernel != kernel for row in asked):
            raise LiaoyuanError(f"The kernel {kernel} is not in use for {name or 'any operator'}: {asked[0].reason}")


@dataclass(frozen=True)
class Row:
    """An operator's output in both runs.

    difference: as it came about; it has in it what differed before.
    alone: of what the second run computes from the inputs of the first: the operator's own (None: not computed).
    is_beyond: either is beyond tolerance; is_own: `alone` is, so the operator itself is to blame.
    only: the run that alone called it.
    """

    phase: str
    module: str
    operator: str
    output: int = 0
    difference: Difference = NONE
    alone: Difference | None = None
    is_beyond: bool = False
    is_own: bool = False
    only: Literal["", "A", "B"] = ""

    @property
    def name(self) -> str:
        return f"{self.operator} of {self.module or 'the model'}"


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the calls; differences of the weights' gradients; both losses."""

    rows: tuple[Row, ...]
    gradients: Mapping[str, Difference]
    losses: tuple[float, float]
    tolerance: float
    worst_gradient: str = ""
    differs: bool = False

    @property
    def first(self) -> Row | None:
        """The first operator beyond tolerance."""
        return next((row for row in self.rows if row.is_beyond), None)

    @property
    def parted(self) -> Row | None:
        """The first operator that only one of the two called."""
        return next((row for row in self.rows if row.only), None)


def compare(
    first: Way, second: Way, make_stream: MakeStream, rows: int, length: int,
    tolerance: float | None = None, report: Report = silent,
) -> Comparison:  # fmt: skip
    """Run both ways on the same tokens, forward and backward, and compare every operator's output.

    Args:
        make_stream: gives tokens for the first model, its tokenizer's folder, and a batch of `rows` of `length`.
        tolerance: of the largest element (None: `TOLERANCE` of the coarser dtype).

    Raises:
        LiaoyuanError: a folder has no model, or the two have different architectures.
    """
    for way in (first, second):
        way.check()
    ours, tokenizer = open_model(first.folder, first.device.torch, first.dtype)
    theirs, _ = open_model(second.folder, second.device.torch, second.dtype)
    refuse_different(ours, theirs, first.folder, second.folder)
    batches = some_batches(make_stream(ours, tokenizer, rows, length), rows, length)
    limit = _limit(tolerance, ours, theirs)
    sides = _Sides(first, second, batches, tolerance)
    found, told = list[Row](), None
    with operators_called(), side_by_side(sides.job(ours, "A"), sides.job(theirs, "B")) as pairs:
        for pair in pairs:
            if (pair[0] or pair[1]).call.phase != "update":  # type: ignore[union-attr]  # one of them is there
                found.append(sides.row(pair, limit))
                if (progress := _progress(found[-1], ours.config.num_hidden_layers)) != told:
                    report(progress)
                    told = progress
    return conclude(found, _gradient_differences(ours, theirs), sides.losses, limit)


def compare_layout(
    way: Way, layout: Layout, make_stream: MakeStream, rows: int, length: int,
    tolerance: float | None = None,
) -> Comparison:  # fmt: skip
    """Compare one process with simulated ranks of a layout by the loss and the whole tensors of the gradients.

    Raises:
        LiaoyuanError: the layout does not fit the model or the batch.
    """
    way.check()
    if not way.device.is_cpu:
        raise LiaoyuanError("--layout simulates its ranks on the CPU: leave --device out, or say cpu.")
    model, tokenizer = open_model(way.folder, way.device.torch, way.dtype)
    size = layout.pp * layout.dp * max(1, layout.fsdp) * layout.context * layout.tp
    microbatches = fewest_microbatches(layout) if layout.pp > 1 else 1
    parts = layout.dp * max(1, layout.fsdp) * microbatches
    rows = parts * max(1, rows // parts)
    layout = resolve(layout, size, Shape(model.config, length, rows, microbatches))
    stream = make_stream(model, tokenizer, rows, length)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def job(world: World) -> tuple[float, dict[str, Tensor]]:
        world = world.arrange(layout)
        with torch.device("meta"):
            whole = Decoder(model.config)
        program = lay_out(whole, layout, world)
        _fill(program, weights)
        program.train()
        own = some_batches(stream, rows, length, microbatches, world.data_rank, world.data_size)
        loss = world.sum_numbers(float(program.backward(own, 1.0 / (rows * length))))[0]
        grads = {name: _gradient(weight) for name, weight in program.named_parameters()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in program.named_tensors()}
        whole_grads = program.whole_tensors(zeros | grads)
        return loss, {name: grad.detach() for name, grad in whole_grads if world.is_first and name in names}

    names = {name for name, _ in model.named_parameters()}
    theirs_loss, theirs = simulate(size, job)[0]
    alone = Program([model.train()])
    loss = float(alone.backward(some_batches(stream, rows, length), 1.0 / (rows * length)))
    gradients = {name: Difference.of(_gradient(weight), theirs[name]) for name, weight in model.named_parameters()}
    return conclude([], gradients, {"A": loss, "B": theirs_loss}, _limit(tolerance, model))


def conclude(
    rows: Sequence[Row], gradients: Mapping[str, Difference], losses: Mapping[str, float],
    tolerance: float,
) -> Comparison:  # fmt: skip
    """Return the comparison with its verdict."""
    worst = max(gradients, key=lambda name: gradients[name].relative, default="")
    differs = any(row.is_beyond for row in rows) or bool(worst and not gradients[worst].relative <= tolerance)
    return Comparison(tuple(rows), gradients, (losses["A"], losses["B"]), tolerance, worst, differs)


def refuse_different(ours: Decoder, theirs: Decoder, first: Path, second: Path) -> None:
    """Raise LiaoyuanError if two models are not of one architecture."""
    a, b = (model.config.to_dict() for model in (ours, theirs))
    for key in sorted({*a, *b}):
        if key not in FREE_WORDS and a.get(key) != b.get(key):
            raise LiaoyuanError(
                f"{first} and {second} are different architectures ({key} is {a.get(key)!r} and {b.get(key)!r}), "
                "so their operators cannot be compared."
            )


class _Sides:
    """What the two runs of a comparison leave for each other: the first goes ahead, by one operator."""

    def __init__(self, first: Way, second: Way, batches: list[Batch], tolerance: float | None) -> None:
        self._ways, self._batches, self._tolerance = {"A": first, "B": second}, batches, tolerance
        self._scale = 1.0 / sum(len(batch.tokens) for batch in batches)
        self.losses: dict[str, float] = {}
        self._ahead: deque[Call] = deque(maxlen=LOOK_AHEAD)  # calls of the first run that the second has yet to make
        self._alone: dict[int, tuple[Tensor, ...]] = {}  # of the second run's calls, by their identity

    def job(self, model: Decoder, letter: str) -> Callable[[Around], None]:
        """Return the run of one side."""
        way = self._ways[letter]

        def run(around: Around) -> None:
            def computed(call: Call, compute: Callable[[], Any]) -> Any:
                if letter == "A" and _operator_of(call):
                    self._ahead.append(call)
                elif letter == "B":
                    self._compute_alone(way, call)
                return around(call, lambda: _compute(way, call, compute))

            with Watch(model.train(), computed):
                total = Program([model]).backward(self._batches, self._scale)
            self.losses[letter] = float(total)

        return run

    def row(self, pair: Pair, limit: float) -> Row:
        a, b = pair
        seen = a or b
        assert seen
        row = Row(seen.call.phase, seen.call.module, seen.call.operator)
        outputs = self._alone.pop(id(b.call), None) if b else None
        if a is None or b is None:
            return replace(row, only="A" if a else "B")
        output, difference = _worst(a.outputs, b.outputs)
        alone = _worst(a.outputs, outputs)[1] if outputs else None
        is_own = bool(alone and not alone.relative <= self._own_limit(a, b))
        is_beyond = is_own or not difference.relative <= limit
        return replace(row, output=output, difference=difference, alone=alone, is_beyond=is_beyond, is_own=is_own)

    def _compute_alone(self, way: Way, call: Call) -> None:
        """Let the second run's kernel compute from the first run's inputs, in the second one's dtypes."""
        if not _operator_of(call) or all(ahead.key != call.key for ahead in self._ahead):
            return
        while (ahead := self._ahead.popleft()).key != call.key:
            pass
        inputs = tuple(_like(x, own) for x, own in zip(ahead.inputs, call.inputs, strict=True))
        if all(_form(x) == _form(own) for x, own in zip(inputs, call.inputs, strict=True)):
            same = replace(call, inputs=inputs)
            output = _compute(way, same, lambda: call.function(*inputs))
            self._alone[id(call)] = tuple(tensors_in(output))

    def _own_limit(self, a: Seen, b: Seen) -> float:
        """Return the tolerance of the operator's self-test in the coarsest dtype that either side reads."""
        if self._tolerance is not None:
            return self._tolerance
        known = TOLERANCE | dict(OPERATORS[_operator_of(b.call)].tolerance)
        return max(known.get(x.dtype, 0.0) for seen in (a, b) for x in tensors_in(seen.call.inputs))


def _progress(row: Row, layers: int) -> Progress:
    """Tell how many layers are behind, of those of the forward and the backward pass."""
    words = row.module.split(".")
    number = int(words[1]) if words[0] == "layers" else 0 if row.module == "embed_tokens" else layers
    done = number if row.phase == "forward" else 2 * layers - number
    return Progress(done, 2 * layers, "layer")


def _limit(tolerance: float | None, *models: Decoder) -> float:
    return max(TOLERANCE[model.config.torch_dtype] for model in models) if tolerance is None else tolerance


def _compute(way: Way, call: Call, compute: Callable[[], Any]) -> Any:
    name = _operator_of(call)
    if not name:
        return compute()
    return compute_with(way.kernels.get(name, way.kernels.get("", AUTO)), call.operator, call.function, call.inputs)


def _operator_of(call: Call) -> str:
    """Return the operator of this package that is called, by its pure schema; "" if it is another's."""
    name = call.operator.removesuffix("_backward")
    return name if name in OPERATORS and not call.named_inputs and not call.function._schema.is_mutable else ""


def _like(x: Any, own: Any) -> Any:
    return x.to(own.device, own.dtype) if isinstance(x, Tensor) and isinstance(own, Tensor) else x


def _form(x: Any) -> Any:
    return x.shape if isinstance(x, Tensor) else x


def _worst(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[int, Difference]:
    """Return the output that differs most, and how."""
    found = [Difference.of(x, y) for x, y in zip(first, second, strict=False)]
    worst = max(range(len(found)), key=lambda index: found[index].relative)
    return worst, found[worst]


def _gradient_differences(ours: Decoder, theirs: Decoder) -> dict[str, Difference]:
    weights = dict(theirs.named_parameters())
    return {
        name: Difference.of(_gradient(weight), _gradient(weights[name])) for name, weight in ours.named_parameters()
    }


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _fill(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Copy each process's own part of the weights into its program."""
    with torch.no_grad():
        for name, tensor in program.named_tensors():
            value = weights[name]
            for dim, (start, size) in enumerate(zip(*own_block(tensor), strict=True)):
                value = value.narrow(dim, start, size)
            local(tensor.detach()).copy_(value)


def growth(comparison: Comparison, factor: float = 2.0) -> Iterator[Row]:
    """Yield the rows that a reader wants: at which the difference appears or grows by `factor` over all before in its
    phase, the first beyond tolerance, those whose operator itself differs most, and the worst of each phase."""
    rows = [row for row in comparison.rows if row.is_beyond or (not row.only and row.difference.relative)]
    chosen = {comparison.first}
    for phase in ("forward", "backward"):
        own, highest = [row for row in rows if row.phase == phase], 0.0
        for row in own:
            if row.difference.relative >= factor * highest:
                chosen.add(row)
            highest = max(highest, row.difference.relative)
        chosen.add(max(own, key=lambda row: row.difference.relative, default=None))
        chosen.add(max((row for row in own if row.alone), key=lambda row: row.alone.relative, default=None))  # type: ignore[union-attr]
    return (row for row in rows if row in chosen)

"""The training loop, to be read from top to bottom: pretraining and supervised fine-tuning are both this loop.

A run is a folder: `metrics.jsonl` has one row a step, `state/` what a killed run goes on from. Started again after
a kill at any moment, it ends with the same weights bit for bit (same processes and threads), since batch i is a
function of i alone and the learning rate a function of the step.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from liaoyuan.checkpoint.training_state import CheckpointConfig, Checkpointer
from liaoyuan.config import Config
from liaoyuan.data import Batch
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.ops import Penalties
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Metrics, Progress, Report, silent
from liaoyuan.training.flops import training_flops
from liaoyuan.training.guard import SpikeConfig, SpikeGuard
from liaoyuan.training.muon import Muon
from liaoyuan.training.objective import Objective
from liaoyuan.training.optimiser import AdamW, Optimiser
from liaoyuan.training.schedule import Shape, learning_rate_at

METRICS = "metrics.jsonl"
STATE = "state"
LOST_LIMIT = 5  # steps in a row whose gradient is not finite, after which a run gives up; fewer are dropped
log = logging.getLogger(__name__)
REPORT_SECONDS = 0.5  # at most so often is progress told


class TrainConfig(Config):
    """What a training run does; a resumed run must be given the same."""

    steps: int = Field(gt=0)
    batch_tokens: int = Field(4096, gt=0)  # tokens of one step, over all microbatches and processes
    microbatches: int = Field(1, gt=0)  # the step's batch is cut in so many, which saves memory
    learning_rate: float = Field(3e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Shape = "linear"
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    optimiser: Literal["adamw", "muon"] = "adamw"
    z_loss: float = Field(0.0, ge=0)  # see `ops.Penalties`
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    master_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: no masters, weights are rounded by chance
    balance_rate: float = Field(1e-3, ge=0)  # step of the routers' balancing bias (sigmoid scores only)
    spikes: SpikeConfig = SpikeConfig()
    seed: int = 0
    checkpoint_every: int = Field(200, gt=0)
    evaluate_every: int = Field(0, ge=0)  # 0: at the end only

    @property
    def penalties(self) -> Penalties | None:
        """What the loss adds to the cross-entropy."""
        return Penalties(self.z_loss, self.label_smoothing) if self.z_loss or self.label_smoothing else None


@dataclass(frozen=True)
class TrainResult:
    """What a run did so far, killed and resumed parts together. Seconds count training alone, not evaluation."""

    steps: int = 0
    tokens: int = 0  # all rows of the batches, padding included, over all processes
    flops: float = 0.0  # model FLOPs, see `flops.training_flops`
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process
    loss: float = math.nan  # of the last step
    passed_over: int = 0  # steps whose data were left out after rolling back

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Stopped(LiaoyuanError):  # noqa: N818  (not an error: it was asked for)
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    exit_code = 130


def train(
    model: Decoder | Program,
    batches: Callable[[int], Sequence[Batch]],
    config: TrainConfig,
    folder: Path,
    report: Report = silent,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    world: World | None = None,
    checkpoint: CheckpointConfig | None = None,
    objective: Objective | None = None,
) -> TrainResult:
    """Train `model` in place for `config.steps` steps, going on from `folder` if it holds a state.

    Args:
        batches: the microbatches of a step that are this process's; a function of the step alone.
        evaluate: gives further values for the metrics of every `config.evaluate_every`-th and the last step; it is
            handed `model`.
        world: the processes that train together; `model` is then a `Program`, laid out over them.
        checkpoint: how states are saved; not part of what the run computes, so it may change when a run goes on.
        objective: what is minimised, if not the cross-entropy of the batches' weights.

    Raises:
        Stopped: Ctrl-C or SIGTERM came; the state is saved.
        LiaoyuanError: the loss stays not finite, the folder is another run's or in use, or the disk is full.
    """
    world = world or World()
    model.train()
    program = model if isinstance(model, Program) else Program([model])
    optimiser = make_optimiser(program, config, world)
    lost = 0  # steps in a row whose gradient was not finite
    tell = _paced(report)
    with Checkpointer(folder / STATE, world, checkpoint) as states, stop_asked() as is_asked:
        done, guard = _resume(states, program, optimiser, config, folder)
        metrics = Metrics(folder / METRICS, resume_from=done.steps) if world.is_first else None
        while done.steps < config.steps:
            step, start = done.steps, _Clock()
            rate = learning_rate_at(step, config.steps, config.learning_rate, config.warmup_steps, config.schedule)
            own = batches(step + done.passed_over)
            outcome = take_step(
                program, optimiser, own, rate, config.clip, world, guard.limits, config.penalties, objective
            )
            guard.note(outcome.loss, outcome.grad_norm, outcome.dropped)
            if guard.wants_to_roll_back and (back := _roll_back(states, program, optimiser, config, done)):
                done, guard = back
                metrics = Metrics(folder / METRICS, resume_from=done.steps) if world.is_first else None
                continue
            lost = 0 if math.isfinite(outcome.grad_norm) else lost + 1
            if lost >= LOST_LIMIT:
                raise LiaoyuanError(_diverged(step, rate))
            done, speed = _add(done, outcome, start)
            last = done.steps == config.steps
            values = _row(outcome, rate, speed, done) | program.balance(config.balance_rate)
            if evaluate and (last or _is_due(done.steps, config.evaluate_every)):
                values |= evaluate(model.eval())
                model.train()
            if metrics:
                metrics.write(step, **values)
            stop = bool(world.sum_numbers(float(is_asked()))[0])
            due = last or stop or _is_due(done.steps, config.checkpoint_every)
            states.after_step(done.steps, program, optimiser, extra_of(done, config, guard), durable=due)
            if last or stop:
                states.wait()
            said = f"loss {outcome.loss:.3f}, {speed:,.0f} tokens/s"
            tell(Progress(done.steps, config.steps, "step", said, outcome.loss))
            if stop and not last:
                raise Stopped(
                    f"Stopped after step {done.steps} of {config.steps}; the same command goes on from there."
                )
    return done


def make_optimiser(model: Decoder | Program, config: TrainConfig, world: World | None = None) -> Optimiser:
    """Return the optimiser that `config` asks for, over all trained weights of `model`."""
    betas, rounded = (config.beta1, config.beta2), config.master_dtype == "bfloat16"
    if config.optimiser == "adamw":
        dtype = torch.bfloat16 if rounded else torch.float32
        named = model.named_parameters()
        return AdamW(named, betas, weight_decay=config.weight_decay, world=world, master_dtype=dtype, seed=config.seed)
    if rounded:
        raise LiaoyuanError(
            "train.master_dtype = 'bfloat16' is for train.optimiser = 'adamw': Muon keeps fp32 masters."
        )
    return Muon(model.named_parameters(), betas=betas, weight_decay=config.weight_decay, world=world)


@dataclass(frozen=True)
class Outcome:
    """What one step did, over all processes."""

    loss: float  # of cross-entropy without penalties, so that runs compare
    grad_norm: float
    tokens: int
    flops: float
    dropped: bool  # a spike, which changed nothing
    padding: float  # share of the tokens that only filled up rows
    shown: dict[str, float] = field(default_factory=dict)  # penalties, or what an objective shows


def take_step(
    program: Program,
    optimiser: Optimiser,
    batches: Sequence[Batch],
    rate: float,
    clip: float,
    world: World,
    limits: tuple[float, float] = (math.inf, math.inf),
    penalties: Penalties | None = None,
    objective: Objective | None = None,
) -> Outcome:
    """Take one optimiser step: the mean loss over the weights of the global batch, whatever its cut; or `objective`.

    A step whose loss or gradient norm is above `limits` changes nothing.
    """
    counted = batches if world.counts else []
    weight, tokens, padding, flops = world.sum_numbers(
        sum(objective.count(batch) if objective else float(batch.weights.sum()) for batch in counted),
        sum(len(batch.tokens) for batch in counted),
        sum(batch.padding for batch in counted),
        sum(training_flops(program.config, batch.boundaries) for batch in counted),
    )
    losses = objective.losses(program, batches, world) if objective else None
    total = program.backward(batches, 1.0 / max(weight, 1e-9), optimiser.accumulate, penalties, losses)
    loss, *further = world.sum_numbers(*total.view(-1).tolist())
    norm = optimiser.step(rate, clip, limits[1] if loss <= limits[0] else -1.0)
    shown = objective.values(further) if objective else dict(zip(("penalty",), further, strict=False))
    spike = loss > limits[0] or norm > limits[1]
    return Outcome(loss, norm, int(tokens), flops, spike, padding / max(tokens, 1.0), shown)


def _resume(
    states: Checkpointer, model: Program, optimiser: Optimiser, config: TrainConfig, folder: Path
) -> tuple[TrainResult, SpikeGuard]:
    """Load the newest state of `folder`; it must have been written under the same config."""
    found = states.load(model, optimiser)
    if found is None:
        return TrainResult(), SpikeGuard(config.spikes)
    _, extra = found
    defaults = TrainConfig(steps=config.steps).model_dump(mode="json")  # of keys that are newer than the run
    settings, wanted = defaults | extra["config"], config.model_dump(mode="json")
    for key in wanted:
        if settings.get(key) != wanted[key]:
            raise LiaoyuanError(
                f"{folder} holds a run with {key} = {settings.get(key)}, not {wanted[key]}: "
                "give the same value to go on with it, or choose another folder."
            )
    return TrainResult(**extra["done"]), SpikeGuard(config.spikes, **extra["guard"])


def _roll_back(
    states: Checkpointer, model: Program, optimiser: Optimiser, config: TrainConfig, done: TrainResult
) -> tuple[TrainResult, SpikeGuard] | None:
    """Go back to the newest state and pass over the data since; None if there is no state yet."""
    states.wait()
    found = states.load(model, optimiser)
    if found is None:
        return None
    step, extra = found
    passed_over = done.passed_over + done.steps + 1 - step
    log.warning("Spikes in a row: back from step %d to %d, past %d steps of data.", done.steps, step, passed_over)
    return replace(TrainResult(**extra["done"]), passed_over=passed_over), SpikeGuard(config.spikes, **extra["guard"])


def extra_of(done: TrainResult, config: TrainConfig, guard: SpikeGuard) -> dict[str, Any]:
    """Return what a state of the run holds beside its tensors."""
    return {"done": asdict(done), "config": config.model_dump(mode="json"), "guard": guard.state()}


def _add(done: TrainResult, outcome: Outcome, start: "_Clock") -> tuple[TrainResult, float]:
    """Return the run with one more step, and that step's tokens per second."""
    now = _Clock()
    seconds = now.seconds - start.seconds
    total = TrainResult(
        done.steps + 1,
        done.tokens + outcome.tokens,
        done.flops + outcome.flops,
        done.seconds + seconds,
        done.cpu_seconds + now.cpu_seconds - start.cpu_seconds,
        outcome.loss,
        done.passed_over,
    )
    return total, outcome.tokens / seconds


def _row(outcome: Outcome, rate: float, speed: float, done: TrainResult) -> dict[str, float]:
    return {
        "tokens": done.tokens,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "learning_rate": rate,
        "tokens_per_second": round(speed, 1),
        "cpu_seconds": round(done.cpu_seconds, 3),
        "flops": done.flops,
        **({"padding": round(outcome.padding, 4)} if outcome.padding else {}),
        **outcome.shown,
        **({"dropped": 1} if outcome.dropped else {}),
    }


def _is_due(steps: int, every: int) -> bool:
    return every > 0 and steps % every == 0


def _diverged(step: int, rate: float) -> str:
    return (
        f"The gradient was not finite in {LOST_LIMIT} steps in a row, up to step {step} (learning rate {rate:.2g}); "
        "lower train.learning_rate, or look for broken weights or data."
    )


@dataclass(frozen=True)
class _Clock:
    """A moment, in wall and in CPU time."""

    seconds: float = field(default_factory=time.perf_counter)
    cpu_seconds: float = field(default_factory=time.process_time)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between steps; a second Ctrl-C interrupts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _paced(report: Report) -> Report:
    """Return `report` called at most every `REPORT_SECONDS`, and at the end."""
    last = -math.inf

    def tell(progress: Progress) -> None:
        nonlocal last
        if progress.done == progress.total or time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            report(progress)

    return tell

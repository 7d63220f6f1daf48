"""What fine-tuning and learning from preferences hold and take: a dry step of the program, and as many as the records
make.
"""

import math
from dataclasses import dataclass

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.apart import apart
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.ops import ops_of
from liaoyuan.compute.plan.program.trace import Held, Trace
from liaoyuan.compute.plan.span import Span
from liaoyuan.compute.plan.step.prices import Prices
from liaoyuan.compute.plan.step.spread import Spread, spread_of
from liaoyuan.compute.plan.step.timeline import play
from liaoyuan.compute.plan.tuning.dry_tune import TuneJob, dry_tune
from liaoyuan.compute.plan.tuning.update_price import Update, UpdatePrice
from liaoyuan.models.lora import projections
from liaoyuan.tuning.sft_config import EVALUATIONS, FEWEST_STEPS

PADDING = 0.03  # share of the tokens of rows that are packed; docs/tune.md measures 1 to 4%
FEW_BITS = {"int8": 1.0, "int4": 0.5 + 2 / 32}  # bytes of a weight below adapters, scales included


@dataclass(frozen=True)
class Records:
    """What there is to learn: how many records, and the tokens of all of them; held_out: tokens that are measured."""

    count: int
    tokens: int
    held_out: int = 0

    @property
    def mean(self) -> int:
        return max(2, round(self.tokens / max(1, self.count)))


@dataclass(frozen=True)
class LearnPlan:
    """A run of `steps` steps on so many processes. peak: bytes of tensors of a process at most, of which `lasting`
    between steps; held: what they are. trained: numbers that are trained. seconds: of a step; hours: of the run, with
    what it measures and asks of the model to begin with. width: by figure, the share of a step's uncertainty.
    """

    steps: int
    tokens: int
    peak: int
    lasting: int
    held: tuple[Held, ...]
    trained: int
    flops: int
    seconds: Span
    hours: Span
    width: dict[str, float]
    rests_on: str


def steps_of(records: Records, epochs: float, batch_tokens: int) -> int:
    """Return in how many steps records are seen so often, when they are packed; see `tuning.sft_config.resolved`."""
    return max(FEWEST_STEPS, math.ceil(records.tokens * epochs / (1 - PADDING) / batch_tokens))


def plan_learning(tune: TuneJob, records: Records, cluster: Cluster, profile: DeviceProfile) -> LearnPlan:
    """Return what a run takes whose steps are those of `tune`.

    Raises:
        LiaoyuanError: the layout does not fit, or the model has no projections to adapt.
    """
    step = apart(dry_tune, tune)
    found = priced(step.trace, tune.job, cluster, profile)
    usual = found.span
    saved = _saved(tune)
    train = tune.job.train
    share = step.trained / tune.job.model.num_parameters()
    further = _beside(tune, records, UpdatePrice(tune.job.model, cluster, profile.median(), trained=min(1.0, share)))
    return LearnPlan(
        train.steps,
        train.steps * train.batch_tokens,
        step.trace.peak - saved,
        step.trace.before - saved,
        tuple(step.trace.held),
        step.trained,
        step.trace.flops,
        usual,
        usual.times((train.steps + further / usual.median) / 3600),
        found.shares,
        profile.rests_on,
    )


def priced(trace: Trace, job: Job, cluster: Cluster, profile: DeviceProfile) -> Spread:
    """Return the seconds of a recorded step of a job without a pipeline, played on its streams."""
    ops = ops_of(trace.events, job.device != "cpu", job.layout.overlap)[0]

    def seconds(certain: DeviceProfile) -> float:
        return play(ops, Prices.of(job, cluster, certain))[-1].seconds * certain.step.median

    return spread_of(seconds, profile)


def _beside(tune: TuneJob, records: Records, price: UpdatePrice) -> float:
    """Return the seconds of what is computed beside the steps: measuring, and the reference of every answer once."""
    cards, context = tune.job.processes, records.mean / 2
    passes = EVALUATIONS + 1
    took = (
        passes * price.forward(Update(records.held_out, context, records.held_out), cards) if records.held_out else 0.0
    )
    loss = tune.preference
    if loss is not None and loss.has_reference and not tune.has_adapters:
        took += price.forward(Update(records.tokens, context, records.tokens), cards)
    return took


def _saved(tune: TuneJob) -> int:
    """Return by how many bytes weights of few bits below adapters are smaller than what the dry step held."""
    if not tune.has_adapters or tune.lora.base == "whole":
        return 0
    import torch

    from liaoyuan.models import Decoder

    with torch.device("meta"):
        model = Decoder(tune.job.model)
    numbers = sum(math.prod(module.weight.shape) for module in projections(model).values())
    return int(numbers * (tune.job.model.torch_dtype.itemsize - FEW_BITS[tune.lora.base]))

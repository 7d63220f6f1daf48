"""How a job of one size trains on its best layout among failures: first by formulas, then by a whole search."""

import math
from dataclasses import dataclass, replace

from liaoyuan.checkpoint.training_state import CheckpointConfig
from liaoyuan.compute.plan.goodput import Goodput, Run, formula_every, goodput
from liaoyuan.compute.plan.goodput.estimate import DAY
from liaoyuan.compute.plan.goodput.state import state_bytes
from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.cost import peak_flops
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.reckoned import by_formulas, by_prediction
from liaoyuan.compute.plan.search.search import Choice, search
from liaoyuan.compute.plan.search.space import Kept
from liaoyuan.compute.plan.span import Span, exactly
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Report, silent

LIVES = 400  # of a job among failures, for each size that is looked at
TRIES = 4  # whole searches, after which one that does is good enough
UNCUT = {"ring": 1, "ulysses": 1}


@dataclass(frozen=True)
class Outcome:
    """A job on its best layout. days: failures included. effective: share of the time that counts.

    peak: FLOP/s of a card's products. every: steps between saves, None if the share of the time was given.
    megawatt_hours: of the cards alone. cost: in the currency of the cluster's `price_per_hour`, spare nodes included.
    Both None where the cluster's file has no such figure.
    """

    choice: Choice
    cluster: Cluster
    peak: float
    steps: int
    days: Span
    effective: Span
    every: int | None
    megawatt_hours: Span | None
    cost: Span | None

    @property
    def job(self) -> Job:
        return self.choice.job

    @property
    def card_hours(self) -> Span:
        return self.days.times(24.0 * self.job.processes)


@dataclass(frozen=True)
class Asker:
    """What sizes are asked about. saving: how states are saved; as often as Daly's formula says.

    effective: share of the time that counts; None: what failures leave of it. whole: layouts that a search predicts.
    """

    cluster: Cluster
    profile: DeviceProfile
    saving: CheckpointConfig
    effective: Span | None = None
    whole: int = 4

    def sketched(self, job: Job, tokens: float) -> Outcome:
        """Return how the job trains on `tokens` in its best layout, by formulas.

        Raises:
            LiaoyuanError: no layout is legal, or none fits.
        """
        return self._outcome(self._best(job, 0, silent), tokens)

    def searched(self, job: Job, tokens: float, report: Report = silent) -> Outcome:
        """Return how the job trains on `tokens` in its best layout, by whole predictions (by formulas if there are to
        be none).

        Raises:
            LiaoyuanError: no layout is legal, or none fits.
        """
        return self._outcome(self._best(job, self.whole, report), tokens)

    def _best(self, job: Job, whole: int, report: Report) -> Choice:
        """Return the best of the usual layouts; of all, if none of these can be."""
        cluster, profile = self.cluster, self.profile
        reckon = by_prediction(cluster, profile) if whole else by_formulas(cluster, profile)
        workers = 2 if whole else 0
        try:
            return search(job, cluster, profile, reckon, _usual(job), whole or 1, report, workers).best
        except LiaoyuanError:
            return search(job, cluster, profile, reckon, None, whole or 1, report, workers).best

    def _outcome(self, choice: Choice, tokens: float) -> Outcome:
        job, card = choice.job, self.cluster.accelerator
        steps = max(1, math.ceil(tokens / job.tokens))
        seconds = choice.found.seconds if choice.found else exactly(choice.seconds)
        peak = peak_flops(job.model.dtype, self.profile)
        if self.effective is None:
            every, lives = self._among_failures(job, steps, seconds)
            energy = lives.energy_mwh if card.watts else None
            cost = lives.cost if card.price_per_hour else None
            days, share = lives.days, lives.goodput
            return Outcome(choice, self.cluster, peak, steps, days, share, every, energy, cost)
        days = _days(steps, seconds, self.effective)
        hours = days.times(24.0 * job.processes)
        energy = hours.times(card.watts / 1e6) if card.watts else None
        cost = hours.times(card.price_per_hour) if card.price_per_hour else None
        return Outcome(choice, self.cluster, peak, steps, days, self.effective, None, energy, cost)

    def _among_failures(self, job: Job, steps: int, seconds: Span) -> tuple[int, Goodput]:
        train = job.train.model_copy(update={"steps": steps})
        run = Run.of(train, self.saving, seconds, job.processes, state_bytes(job.model, train))
        run = replace(run, every=formula_every(run, self.cluster))
        return run.every, goodput(run, self.cluster, LIVES)


def _usual(job: Job) -> Kept:
    """Return the layouts that are looked at, a twentieth of all: one pipeline schedule, and whole sequences where there
    are enough of them.
    """
    return Kept.of({"schedule": "1f1b"} | (UNCUT if job.rows >= job.processes else {}))


def _days(steps: int, seconds: Span, effective: Span) -> Span:
    """Return the days of so many steps; the widths of steps and of effective time are added in quadrature."""
    median = steps * seconds.median / effective.median / DAY
    above = math.hypot(math.log(seconds.high / seconds.median), math.log(effective.median / effective.low))
    below = math.hypot(math.log(seconds.median / seconds.low), math.log(effective.high / effective.median))
    return Span(median * math.exp(-below), median, median * math.exp(above))


def check(**values: float) -> None:
    """Refuse what is no number above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise LiaoyuanError(f"{name} is {value:g}: it must be a number above 0.")


def check_rows(job: Job) -> None:
    if not job.rows:
        raise LiaoyuanError(
            f"A step of {job.train.batch_tokens:,} tokens has no row of {job.sequence_length:,}: give it more tokens "
            "(batch_tokens), or its rows fewer (sequence_length)."
        )


def least_card_days(job: Job, tokens: float, profile: DeviceProfile) -> float:
    """Return the days of one card for the model FLOPs of all tokens, at the peak of its products."""
    return tokens / job.tokens * job.flops / peak_flops(job.model.dtype, profile) / DAY

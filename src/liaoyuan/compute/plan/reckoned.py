"""What is told of a layout in a ranking, whoever has reckoned it: the whole prediction, or formulas alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from liaoyuan.compute.plan.bounds import memory
from liaoyuan.compute.plan.cluster import Cluster
from liaoyuan.compute.plan.dry_run import Job
from liaoyuan.compute.plan.estimate import Estimator
from liaoyuan.compute.plan.fabric import Fabric
from liaoyuan.compute.plan.predict import predict
from liaoyuan.compute.plan.profile import DeviceProfile, Figure
from liaoyuan.compute.plan.step_time import Span
from liaoyuan.training.flops import TRAINING

Z90 = 1.645  # standard deviations on either side that hold 90% of a normal distribution


@dataclass(frozen=True)
class Reckoned:
    """Of one layout. seconds: of a step. bytes: that a process holds at most, of the `room` that its card has.

    computing: seconds in which the busiest card computes. exposed: by axis, seconds in which a card waits for it;
    "bubble" is waiting for other stages.
    """

    seconds: Span
    bytes: float
    room: int
    computing: float
    exposed: dict[str, float] = field(default_factory=dict)
    rests_on: str = ""

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room

    @property
    def bubble(self) -> float:
        """Share of the step in which a card waits for other stages."""
        return self.exposed.get("bubble", 0.0) / self.seconds.median


def tokens_per_second(job: Job, seconds: float) -> float:
    """Return the tokens of a second and card."""
    return job.train.batch_tokens / seconds / job.processes


def utilisation(job: Job, cluster: Cluster, seconds: float) -> float:
    """Return the model FLOPs of a step over what the cards could do in it (MFU; `training.flops`)."""
    context = (job.sequence_length + 1) / 2
    model = TRAINING * job.train.batch_tokens * job.model.flops_per_token(context)
    peaks = cluster.accelerator.peak_tflops
    peak = peaks.get(job.model.dtype, peaks.get("bfloat16", max(peaks.values())))
    return model / (seconds * job.processes * peak * 1e12)


def by_prediction(cluster: Cluster, profile: DeviceProfile) -> Callable[[Job], Reckoned]:
    """Return what reckons a layout by its whole prediction, from dry runs of a few layers."""

    def reckon(job: Job) -> Reckoned:
        found = predict(job, cluster, profile, at_once=1)
        fullest = max(found.memory, key=lambda one: one.total.median / one.room)
        step = found.step
        return Reckoned(step.seconds, fullest.total.median, fullest.room, step.computing, step.exposed, step.rests_on)

    return reckon


def by_formulas(cluster: Cluster, profile: DeviceProfile) -> Callable[[Job], Reckoned]:
    """Return what reckons a layout by formulas: each figure moved alone to either end of its interval."""
    certain = profile.median()
    middle = Estimator(Fabric(cluster, certain), certain)
    moved = [
        (_moved(cluster, profile, name, -Z90), _moved(cluster, profile, name, Z90))
        for name, figure in profile.figures().items()
        if figure.sigma and name != "step"
    ]

    def reckon(job: Job) -> Reckoned:
        found = middle.of(job)
        widths = [abs(math.log(high.of(job).seconds / low.of(job).seconds)) / 2 for low, high in moved]
        width = math.hypot(*widths, Z90 * profile.step.sigma)
        median = found.seconds * profile.step.median
        return Reckoned(
            Span(median * math.exp(-width), median, median * math.exp(width)),
            memory(job).peak,
            cluster.accelerator.usable_bytes,
            found.computing,
            found.exposed,
            f"formulas, and {profile.rests_on}",
        )

    return reckon


def _moved(cluster: Cluster, profile: DeviceProfile, moved: str, by: float) -> Estimator:
    def change(name: str, figure: Figure) -> Figure:
        return figure.at(by if name == moved else 0.0)

    one = profile.with_figures(change)
    return Estimator(Fabric(cluster, one), one)

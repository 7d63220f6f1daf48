"""What is told of a layout in a ranking, whoever has reckoned it: the whole prediction, or formulas alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.search.bounds import memory
from liaoyuan.compute.plan.search.estimate import Estimator
from liaoyuan.compute.plan.span import Span
from liaoyuan.compute.plan.step.predict import predict
from liaoyuan.compute.plan.step.spread import ends_of, spread


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
    moved = {
        name: tuple(Estimator(Fabric(cluster, end), end) for end in ends) for name, ends in ends_of(profile).items()
    }

    def seconds(estimator: Estimator, job: Job) -> float:
        return estimator.of(job).seconds * estimator.profile.step.median

    def reckon(job: Job) -> Reckoned:
        found = middle.of(job)
        ends = {name: (seconds(low, job), seconds(high, job)) for name, (low, high) in moved.items()}
        return Reckoned(
            spread(seconds(middle, job), ends).span,
            memory(job).peak,
            cluster.accelerator.usable_bytes,
            found.computing,
            found.exposed,
            f"formulas, and {profile.rests_on}",
        )

    return reckon

"""A step of a job on a cluster before either exists: how long it takes, what it holds, and how sure that is."""

from dataclasses import asdict, dataclass
from typing import Any

from liaoyuan.compute.plan.cluster import Cluster
from liaoyuan.compute.plan.dry_run import Job
from liaoyuan.compute.plan.profile import DeviceProfile
from liaoyuan.compute.plan.step_time import Span, StepTime
from liaoyuan.compute.plan.trace import Held


@dataclass(frozen=True)
class Memory:
    """What the processes of one kind hold in a step.

    rank: one of them. stage: their place in the pipeline, in words. tensors: bytes at the peak, of which `lasting` are
    held between steps; `held` says what they are, largest first. allowance: by name, bytes that come on top. total:
    both together; room: bytes that the card has for them. timeline: (second, bytes of tensors) where asked for.
    """

    rank: int
    stage: str
    tensors: int
    lasting: int
    allowance: dict[str, Span]
    total: Span
    room: int
    held: tuple[Held, ...] = ()
    timeline: tuple[tuple[float, int], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it does by the median."""
        return self.total.median <= self.room


@dataclass(frozen=True)
class Prediction:
    """A step of a job on a cluster.

    step: how long it takes. memory: of each kind of process. tokens_per_second: of one card. model_utilisation,
    hardware_utilisation: model FLOPs, and those executed (recomputation too), over what a card's peak would do. bubble:
    share of the step in which a card waits for other stages. width: by figure of the profile, the share of the
    uncertainty (variance of the logarithm) that comes from it, largest first. rests_on: what it rests on, in words.
    """

    step: StepTime
    memory: tuple[Memory, ...]
    tokens_per_second: Span
    model_utilisation: Span
    hardware_utilisation: Span
    bubble: float
    width: dict[str, float]
    rests_on: str

    @property
    def fits(self) -> bool:
        """Whether every kind of process fits its card."""
        return all(one.fits for one in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"fits": self.fits, **asdict(self)}


def predict(job: Job, cluster: Cluster, profile: DeviceProfile | None = None, details: bool = False) -> Prediction:
    """Return how a step of the job goes on this cluster, whose cards are those of the profile (None: `assumed`).

    details: with bars (`StepTime.bars`) and a memory timeline for each kind of process.

    Raises:
        LiaoyuanError: the layout does not fit the job.
    """
    raise NotImplementedError

"""How long a step takes, as an interval that says what it rests on."""

from dataclasses import dataclass, field

from liaoyuan.compute.plan.span import Span


@dataclass(frozen=True)
class Bar:
    """One piece of a Gantt chart: seconds from `begin` to `end` on a stream, of what."""

    stream: str
    begin: float
    end: float
    name: str


@dataclass(frozen=True)
class StepTime:
    """A step of a job.

    seconds: of the whole step. computing: seconds in which a card computes. exposed: by axis, seconds in which a card
    does nothing but wait for it; "bubble" is waiting for other stages, "launch" for its own host.
    bars: the step as a Gantt chart of one process of each kind, where asked for. rests_on: what the figures are from.
    """

    seconds: Span
    computing: float
    exposed: dict[str, float] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    rests_on: str = ""

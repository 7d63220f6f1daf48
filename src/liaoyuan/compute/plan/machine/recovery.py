"""What failures do to a job on a cluster, and what it takes to go on: the `[failures]` and `[recovery]` of its file.

Nobody knows these figures exactly, so each is a belief: a median and a 90% range. Defaults are what published jobs
report; where nothing is published the range is wide and the comment says so.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from liaoyuan.compute.plan.span import Span, exactly
from liaoyuan.config import Config

KEYS = ("low", "median", "high")


def _written(value: Any) -> Any:
    """Return a span as its three keys, however a file has it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return exactly(float(value))
    if isinstance(value, list | tuple):
        if len(value) != 3:
            raise ValueError("write a number, or three: [low, median, high]")
        return dict(zip(KEYS, value, strict=True))
    if isinstance(value, dict) and (unknown := set(value) - set(KEYS)):
        raise ValueError(f"a span has low, median and high, not {', '.join(sorted(unknown))}")
    return value


def _in_order(value: Span) -> Span:
    if not 0 <= value.low <= value.median <= value.high < math.inf:
        raise ValueError("low, median and high must rise, from 0 on")
    if value.low == 0 < value.high:
        raise ValueError("low is 0: only what is exactly 0 may be")
    return value


# In a file: a number (known exactly), a list [low, median, high], or the three keys.
Belief = Annotated[Span, BeforeValidator(_written), AfterValidator(_in_order)]


class Failures(Config):
    """Unexpected interruptions per 1,000 node-days, whatever their cause: the median and 90% range of a belief.

    Published, of 8 accelerators a node: GLM-130B 1.9, RSC-2 2.3, BLOOM 3.0, Llama 3 3.8, RSC-1 6.5, OPT 15.6.

    shape: of the Weibull gaps between two of them; 1 is exponential, below 1 a restart is soon followed by the next.
    """

    median: float = Field(3.5, gt=0)
    low: float = Field(2.0, gt=0)
    high: float = Field(15.0, gt=0)
    shape: float = Field(1.0, ge=0.3, le=3)

    @property
    def rate(self) -> Span:
        return Span(self.low, self.median, self.high)

    @model_validator(mode="after")
    def _in_order(self) -> "Failures":
        if not self.low <= self.median <= self.high:
            raise ValueError("low, median and high must rise")
        return self


class Kind(Config):
    """A way to fail.

    share: of the failures, beside the shares of other kinds. detect: seconds until the job has ended and the cause is
    known. loses_node: a node must be replaced. unnoticed_hours: in which wrong numbers were computed and saved (mean).
    """

    name: str
    share: float = Field(ge=0)
    detect: Belief
    loses_node: bool = False
    unnoticed_hours: float = Field(0.0, ge=0)


# Shares: 9.9% hang (ByteRobust, arXiv 2509.16293), 6 of 419 silent (Llama 3, table 5). What is left is divided between
# those that a new process mends (75% in DLRover's README; of Llama 3's at most the 40% that name no broken part) and
# those that need another node, half and half. Detection: below 10 minutes with diagnosis (MegaScale, NSDI'24), 10 s
# where a process that died is seen by its launcher; hangs by a timeout (10 minutes here and in torch), over 30 by hand
# (Minder, NSDI'25). How long silent corruption goes unnoticed is not published: a guess.
KINDS = (
    Kind(name="process", share=0.445, detect=Span(10, 30, 300)),
    Kind(name="node", share=0.445, detect=Span(30, 120, 600), loses_node=True),
    Kind(name="hang", share=0.099, detect=Span(300, 600, 1800), loses_node=True),
    Kind(name="silent", share=0.014, detect=Span(300, 600, 3600), loses_node=True, unnoticed_hours=3.0),
)


class Recovery(Config):
    """From a failure to the next step, saving, and what else takes time. Seconds where nothing else is said.

    spares: nodes that wait beside those of the job. repair_hours: until a lost one is back.
    """

    kinds: tuple[Kind, ...] = KINDS
    spares: int = Field(0, ge=0)
    # A warm standby takes minutes, another node from the scheduler about ten times as long (ByteRobust: 10.87 times).
    swap: Belief = Span(30, 120, 600)
    requeue: Belief = Span(600, 2400, 7200)
    repair_hours: Belief = Span(4, 24, 168)  # not published: from a reset in the same shift to a part by post
    # Processes, rendezvous (10 s on 4,000 hosts, pytorch PR 124982), groups (30 s above 10,000, MegaScale), first step.
    start: Belief = Span(60, 180, 600)
    # Saving: until all processes have agreed and the copy to memory may begin (0.2 to 0.5 s, DLRover).
    stall: Belief = Span(0.2, 0.5, 2.0)
    copy_gb: Belief = Span(2, 5, 20)  # GB/s of a card to the memory of its host; PCIe gives 25 to 50 at best
    storage_share: Belief = Span(0.3, 0.6, 1.0)  # of the storage's rate that a job gets; others write too
    slow_while_saving: Belief = Span(1.0, 1.02, 1.22)  # times as long: ByteRobust below 1.009, marin#9180 1.22
    local_survives: bool = False  # whether local copies outlive their node (a copy in a peer's memory)
    # Slow nodes and links: 16 of 27 jobs of at least 512 cards had them, 72 minutes in the mean, and took 1.34 times as
    # long then (Greyhound, ATC'25). Shares of the time below are what remains when most are found: not published.
    slow_share: Belief = Span(0.002, 0.02, 0.15)
    slow_factor: Belief = Span(1.05, 1.34, 2.0)
    # Planned stops: 47 in the 54 days of Llama 3; how long each took is not published.
    stops_per_month: float = Field(0.0, ge=0)
    stop: Belief = Span(300, 900, 3600)
    idle_power: float = Field(0.2, ge=0, le=1)  # of a card's watts while it waits; a guess, H100s idle near 0.1

    @model_validator(mode="after")
    def _some_kind(self) -> "Recovery":
        if sum(kind.share for kind in self.kinds) <= 0:
            raise ValueError("the shares of the kinds of failures add up to nothing")
        if self.slow_while_saving.low < 1 or self.slow_factor.low < 1:
            raise ValueError("slow_while_saving and slow_factor are times as long: at least 1")
        return self

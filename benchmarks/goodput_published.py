"""Published jobs beside what `plan goodput` says of them: effective training time ratio, failures, hours between them.

A job's row holds what its source states of the job, and the figure that is scored. Nothing is fitted on it: the belief
about how often nodes fail is made of the other sources' rates, and where a default of `[recovery]` comes from the
source itself, the row takes a wide range in its place. What the source does not state is a range too, so that a row
that says little gets a wide interval.

    python benchmarks/goodput_published.py --json published.json
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from liaoyuan.compute.plan import Cluster, read_cluster
from liaoyuan.compute.plan.goodput import Run
from liaoyuan.compute.plan.goodput.estimate import DAY, chances_of, costs_of, live
from liaoyuan.compute.plan.machine.cluster import Storage
from liaoyuan.compute.plan.machine.recovery import KINDS, Failures, Kind, Recovery
from liaoyuan.compute.plan.span import Z90, Span, exactly

LIVES = 1000
MINUTE = 60.0
RATES = {  # unexpected interruptions per 1,000 node-days, of 8 accelerators
    "GLM-130B": 1.9,
    "RSC-2": 2.3,
    "BLOOM": 3.0,
    "Llama 3": 3.8,
    "RSC-1": 6.5,
    "OPT": 15.6,
}
# In place of defaults that come from the scored source.
KINDS_WITHOUT_BYTEDANCE = (
    Kind(name="process", share=0.4, detect=Span(10, 60, 600)),
    Kind(name="node", share=0.5, detect=Span(30, 300, 1800), loses_node=True),
    Kind(name="hang", share=0.1, detect=Span(300, 1200, 3600), loses_node=True),
)
KINDS_WITHOUT_DLROVER = (
    Kind(name="process", share=0.3, detect=Span(10, 30, 300)),  # Llama 3 names no broken part for at most 40%
    *(kind.model_copy(update={"share": share}) for kind, share in zip(KINDS[1:3], (0.6, 0.1), strict=True)),
)


@dataclass(frozen=True)
class Row:
    """A job and what is reported of it. `reported` of `metric`; `bound`: it is said to be above that.

    saves: seconds between saves. rate: per 1,000 node-days, if not of the other sources. given: what the row is fed of
    its own source.
    """

    source: str
    cards: int
    days: float
    metric: str
    reported: float
    bound: bool = False
    weights: float = 100e9
    saves: Span = field(default_factory=lambda: Span(10 * MINUTE, 30 * MINUTE, 180 * MINUTE))
    step: float = 10.0
    asynchronous: bool = True
    every_step: bool = False
    rate: Span | None = None
    storage: Storage = field(default_factory=Storage)
    recovery: Recovery = field(default_factory=Recovery)
    given: str = ""


def others(source: str) -> Span:
    """Return the belief about the rate that the other sources make: log-normal, of their mean and deviation."""
    logs = [math.log(rate) for name, rate in RATES.items() if name != source]
    centre, width = statistics.fmean(logs), Z90 * statistics.stdev(logs)
    return Span(math.exp(centre - width), math.exp(centre), math.exp(centre + width))


def counted(failures: int, cards: int, days: float) -> Span:
    """Return the rate of so many failures, with the range of a count."""
    rate = failures / (cards / 8) / days * 1000
    width = Z90 / math.sqrt(failures)
    return Span(rate * math.exp(-width), rate, rate * math.exp(width))


ENOUGH = 64  # spare nodes, where a job had a larger cluster around it
LLAMA = Row(
    "Llama 3",
    16384,
    54,
    "ETTR",
    0.90,
    bound=True,
    weights=405e9,
    storage=Storage(write_gb=2000, read_gb=2000),
    recovery=Recovery(kinds=KINDS[:3], spares=ENOUGH, stops_per_month=47 / 54 * 30),
    given="model, storage, planned stops",
)
BYTEDANCE = Recovery(
    kinds=KINDS_WITHOUT_BYTEDANCE,
    spares=ENOUGH,
    start=Span(60, 300, 1200),
    requeue=Span(600, 3600, 14400),
    slow_while_saving=Span(1.0, 1.05, 1.22),
)
DLROVER = Recovery(kinds=KINDS_WITHOUT_DLROVER, stall=Span(0.1, 1.0, 10.0))
BLOCKING = DLROVER.model_copy(update={"stall": exactly(120), "copy_gb": exactly(1e9), "spares": 0})
THOUSANDS = others("")  # of cards: 2,000 here, from half to twice as many
THOUSANDS = Span(THOUSANDS.low / 2, THOUSANDS.median, THOUSANDS.high * 2)
SHORT_STALL = DLROVER.model_copy(update={"stall": exactly(0.2), "copy_gb": exactly(1e9), "spares": 16})
ROWS = (
    replace(LLAMA, rate=counted(419, 16384, 54), given=LLAMA.given + ", number of failures"),
    LLAMA,
    Row(
        "ByteRobust",
        9600,
        90,
        "ETTR",
        0.97,
        every_step=True,
        recovery=BYTEDANCE.model_copy(update={"local_survives": True, "stall": exactly(0.09), "copy_gb": exactly(1e9)}),
        given="a copy in a peer's memory every step at 0.9%, standby nodes",
    ),
    Row("MegaScale", 12288, 30, "ETTR", 0.90, bound=True, weights=175e9, recovery=BYTEDANCE, given="spares"),
    Row(
        "DLRover before",
        2000,
        30,
        "ETTR",
        0.69,
        weights=65e9,
        rate=THOUSANDS,
        recovery=BLOCKING,
        given="saves of 2 minutes, no spares",
    ),
    Row(
        "DLRover after",
        2000,
        30,
        "ETTR",
        0.95,
        weights=65e9,
        rate=THOUSANDS,
        recovery=SHORT_STALL,
        given="saves of 0.2 s, spares",
    ),
    Row("Llama 3", 16384, 54, "failures", 419),
    Row("OPT", 1024, 60, "failures", 90),
    Row("GLM-130B", 768, 54, "failures", 10),
    Row("BLOOM", 384, 105, "failures", 15, given="one a week, 3.5 months"),
    Row("RSC-1", 1024, 30, "hours between failures", 7.9, rate=exactly(6.5), given="rate of the whole cluster"),
    Row("RSC-1", 16384, 30, "hours between failures", 1.8, rate=exactly(6.5), given="rate of the whole cluster"),
)


@dataclass(frozen=True)
class Scored:
    row: Row
    low: float
    median: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the reported value is in the interval; of a bound, whether the interval reaches above it."""
        return self.high >= self.row.reported and (self.row.bound or self.low <= self.row.reported)


def score(row: Row, lives: int) -> Scored:
    """Simulate the row's job."""
    rate = row.rate or others(row.source)
    belief = Failures(low=rate.low, median=rate.median, high=rate.high)
    changes = {"failures": belief, "recovery": row.recovery, "storage": row.storage}
    cluster: Cluster = read_cluster("h100").model_copy(update=changes)
    local = 1 if row.every_step else 0
    run = Run(
        round(row.days * DAY / row.step), exactly(row.step), row.cards, 14 * row.weights, 1, row.asynchronous, local
    )
    costs = costs_of(run, cluster, lives)
    saves = row.saves.at(np.random.default_rng(5).standard_normal(lives))
    costs = replace(costs, every=np.maximum(1, np.round(saves / row.step)))
    found = live(costs, cluster, chances_of(cluster, lives, 0))
    if row.metric == "ETTR":
        values = found.ettr
    elif row.metric == "failures":  # in the days of the job: a job of so many days of steps takes longer
        values = found.failures / found.seconds * row.days * DAY
    else:
        values = found.seconds / found.failures / 3600
    low, median, high = (float(value) for value in np.quantile(values, [0.05, 0.5, 0.95]))
    return Scored(row, low, median, high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=LIVES)
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    found = [score(row, options.lives) for row in ROWS]
    print("| job | cards | fed with | | reported | simulated, median (90%) | holds |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        row = one.row
        shown = [f"{value:.1%}" if row.metric == "ETTR" else f"{value:.3g}" for value in (row.reported, *_range(one))]
        print(
            f"| {row.source} | {row.cards:,} | {row.given or '-'} | {row.metric} | {'> ' if row.bound else ''}"
            f"{shown[0]} | {shown[2]} ({shown[1]} to {shown[3]}) | {'yes' if one.holds else 'no'} |"
        )
    print(f"\n{sum(one.holds for one in found)} of {len(found)} hold.")
    if options.json:
        values = [{**asdict(one), "row": {"source": one.row.source, "metric": one.row.metric}} for one in found]
        Path(options.json).write_text(json.dumps(values, indent=2) + "\n")


def _range(one: Scored) -> tuple[float, float, float]:
    return one.low, one.median, one.high


if __name__ == "__main__":
    main()

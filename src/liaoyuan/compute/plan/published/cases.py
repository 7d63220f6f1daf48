"""A published row as something to predict: its machines, the jobs it may have been, and the time that figures give it.

Every quantity that sources report is turned into the logarithm of a time: that of a step, or of a token and a card, or
of a counted FLOP. So an error of +0.05 means 5% slower than was measured, whatever was reported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, assumed
from liaoyuan.compute.plan.published.accelerators import Machines, machines
from liaoyuan.compute.plan.published.plausible import Setup, setups
from liaoyuan.compute.plan.published.programs import Habits, Parts, Program, price, program
from liaoyuan.compute.plan.published.rows import Row

Profiles = dict[tuple[float, ...], tuple[DeviceProfile, Fabric, Habits]]


@dataclass(frozen=True)
class Spread:
    """How far a figure may lie from its median, as standard deviations of its logarithm: for all machines alike, for
    those of a generation, and for one source.
    """

    everywhere: float
    generation: float
    source: float

    @property
    def total(self) -> float:
        """All three together."""
        return math.sqrt(self.everywhere**2 + self.generation**2 + self.source**2)


FIGURES: Mapping[str, Spread] = {
    "product": Spread(0.05, 0.08, 0.05),
    "float8": Spread(0.10, 0.10, 0.12),
    "half_k": Spread(0.50, 0.30, 0.00),
    "attention": Spread(0.10, 0.25, 0.30),
    "traffic": Spread(0.15, 0.10, 0.30),
    "calls": Spread(0.30, 0.20, 0.50),
    "near": Spread(0.10, 0.15, 0.15),
    "far": Spread(0.20, 0.20, 0.85),
    "latency": Spread(0.30, 0.20, 0.30),
    "tp": Spread(0.15, 0.15, 0.30),
    "dp": Spread(0.30, 0.20, 0.50),
    "ep": Spread(0.20, 0.20, 0.30),
    "pp": Spread(0.40, 0.20, 0.40),
    "jitter": Spread(0.50, 0.20, 0.70),
    "step": Spread(0.03, 0.02, 0.11),
}
PRIVATE = 0.4  # of a figure's standard deviation for a source, what each of its rows may lie from it
NAMES = tuple(FIGURES)


@dataclass
class Case:
    """A row with its machines and the programs of its draws: those that are alike once, and which one each draw is.

    measured: the logarithm of what was reported, as a time.
    """

    row: Row
    where: Machines
    programs: tuple[Program, ...]
    draws: np.ndarray
    measured: float
    profiles: Profiles = field(default_factory=dict)

    @property
    def nodes(self) -> float:
        """Among which it ran."""
        return self.row.cards / self.where.cluster.per_node

    def priced(self, figures: np.ndarray, which: int) -> Parts:
        """Return the step of one of its programs, with `figures` (of NAMES, as logarithms of factors)."""
        profile, fabric, habits = self._at(figures)
        return price(self.programs[which], profile, fabric, habits, self.nodes)

    def predicted(self, figures: np.ndarray) -> np.ndarray:
        """Return the logarithm of what would be reported, as a time, for each of its programs."""
        return np.array([self.reported(index, figures) for index in range(len(self.programs))])

    def reported(self, which: int, figures: np.ndarray) -> float:
        """Return the logarithm of what would be reported, as a time, by one of its programs."""
        setup = self.programs[which].setup
        return as_time(self.row, self.where, setup, self.priced(figures, which).seconds)

    def asked(self, which: int) -> list[int]:
        """Return which figures its time may depend on, by their place in NAMES."""
        setup = self.programs[which].setup
        without = {
            "float8": setup.dtype != "float8",
            "attention": not setup.fused,
            "near": self.row.cards == 1,
            "far": self.nodes <= 1,
            "latency": self.row.cards == 1,
            "tp": setup.tp == 1,
            "dp": setup.dp * setup.cp == 1,
            "ep": setup.ep == 1,
            "pp": setup.pp == 1,
            "jitter": self.nodes <= 1,
        }
        return [index for index, name in enumerate(NAMES) if not without.get(name)]

    def _at(self, figures: np.ndarray) -> tuple[DeviceProfile, Fabric, Habits]:
        key = tuple(figures.tolist())
        if key not in self.profiles:
            self.profiles[key] = changed(self.where, dict(zip(NAMES, key, strict=True)))
        return self.profiles[key]


def case_of(row: Row, chances: dict[str, np.ndarray], seen: dict[str, Profiles]) -> Case:
    """Return a row as a case. seen: profiles by cluster, shared by all cases."""
    where = machines(row)
    drawn = setups(row, where, chances)
    numbers = {setup: index for index, setup in enumerate(dict.fromkeys(drawn))}
    draws = np.array([numbers[setup] for setup in drawn])
    programs = tuple(program(setup) for setup in numbers)
    measured = math.log(row.value) if row.reported in ("step_time", "card_hours") else -math.log(row.value)
    profiles = seen.setdefault(where.cluster.model_dump_json(), {})
    return Case(row, where, programs, draws, measured, profiles)


def as_time(row: Row, where: Machines, setup: Setup, seconds: float) -> float:
    """Return the logarithm of a step's seconds in a row's terms: those of a step, of a token or of a counted FLOP."""
    if row.reported == "step_time":
        return math.log(seconds)
    each = seconds * setup.cards / setup.tokens
    if row.reported == "tokens":
        return math.log(each)
    if row.reported == "card_hours":
        return math.log(each * (row.tokens_seen or 1.0) / 3600)
    counted = setup.counted_flops()
    if row.reported == "tflops":
        return math.log(each / counted * 1e12)
    return math.log(each / counted * peak_of(where, setup) * 1e12)


def peak_of(where: Machines, setup: Setup) -> float:
    """Return TFLOP/s of a card in the dtype of a job."""
    peaks = where.cluster.accelerator.peak_tflops
    return peaks.get(setup.dtype) or peaks["bfloat16"]


def changed(where: Machines, by: Mapping[str, float]) -> tuple[DeviceProfile, Fabric, Habits]:
    """Return what is usual of such machines and programs, each figure times the exponential of its entry in `by`."""
    levels = [link.name for link in where.cluster.links]
    factors = {
        **{f"links.{name}.share": "far" if name == levels[-1] else "near" for name in levels},
        **{f"links.{name}.latency": "latency" for name in levels},
        "attention_forward": "attention",
        "attention_backward": "attention",
        "step": "step",
    }

    def change(name: str, figure: Figure) -> Figure:
        log = by.get(factors.get(name, ""), 0.0) if name != "memory" else -by["traffic"]
        if name.startswith("products."):
            log = by["product"] + (by["float8"] if name.endswith("float8") else 0.0)
        return Figure(median=figure.median * math.exp(log))

    profile = assumed(where.cluster).with_figures(change)
    products = {
        dtype: rate.model_copy(update={"half_k": rate.half_k * math.exp(by["half_k"])})
        for dtype, rate in profile.products.items()
    }
    profile = profile.model_copy(update={"products": products})
    usual = Habits()
    habits = Habits(
        calls=usual.calls * math.exp(by["calls"]),
        tp=usual.tp * math.exp(by["tp"]),
        dp=usual.dp * math.exp(by["dp"]),
        ep=usual.ep * math.exp(by["ep"]),
        pp=usual.pp * math.exp(by["pp"]),
        jitter=usual.jitter * math.exp(by["jitter"]),
    )
    return profile, Fabric(where.cluster, profile), habits

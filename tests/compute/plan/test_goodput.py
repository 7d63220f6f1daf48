"""Lives of a job among failures: what has a formula agrees with it, what has none with a job lived step by step."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan.goodput.closed_form import availability, daly, expected_ettr, expected_time, young
from liaoyuan.compute.plan.goodput.simulate import LOSSES, Chance, Chances, Costs, Lives, chances, simulate
from liaoyuan.compute.plan.machine.recovery import Kind
from liaoyuan.compute.plan.span import exactly

PLAIN = (Kind(name="process", share=1, detect=exactly(0)),)
NODE = (Kind(name="node", share=1, detect=exactly(0), loses_node=True),)
MIXED = (
    Kind(name="process", share=0.5, detect=exactly(0)),
    Kind(name="node", share=0.3, detect=exactly(0), loses_node=True),
    Kind(name="silent", share=0.2, detect=exactly(0), loses_node=True, unnoticed_hours=0.01),
)
NOTHING = {
    **dict.fromkeys(("block", "write", "local_every", "local_block", "stop", "start", "load", "load_local"), 0.0),
    **dict.fromkeys(("swap", "requeue", "repair", "spares"), 0.0),
    **dict.fromkeys(("step", "stretch", "slow"), 1.0),
    **dict.fromkeys(("mean", "stop_mean"), math.inf),
}


def costs(lives: int, detect: float = 0.0, kinds: int = 1, **values: float) -> Costs:
    filled = {name: np.full(lives, float(value)) for name, value in (NOTHING | values).items()}
    return Costs(detect=np.full((lives, kinds), detect), **filled)


def lived(given: Costs, kinds: tuple[Kind, ...] = PLAIN, chance: Chances | None = None, **options: Any) -> Lives:
    return simulate(given, kinds, chance or chances(7, given.lives), np.full(given.lives, np.inf), **options)


@pytest.mark.parametrize(
    ("save", "mean", "restart", "every", "work"),
    [(5, 500, 20, 100, 2000), (30, 3000, 600, 400, 40000), (5, 200, 100, 50, 2000), (60, 18000, 600, 1200, 120000)],
)
def test_exponential_failures_take_the_time_of_dalys_formula(
    save: float, mean: float, restart: float, every: float, work: float
) -> None:
    found = lived(costs(3000, steps=work, every=every, block=save, mean=mean, start=restart))
    expected = expected_time(work, every, save, restart, mean)
    error = found.seconds.std() / math.sqrt(3000)
    assert abs(found.seconds.mean() - expected) < 3 * error < 0.02 * expected
    np.testing.assert_allclose(found.useful + found.losses.sum(axis=0), found.seconds)
    assert found.ettr.mean() == pytest.approx(availability(every, save, restart, mean), rel=0.03)


def test_rare_failures_leave_the_share_of_the_published_estimate() -> None:
    found = lived(costs(4000, steps=400_000, every=1000, block=4, mean=40_000, start=600))
    expected = expected_ettr(1000, 4, 600, 40_000)
    assert 1 - found.ettr.mean() == pytest.approx(1 - expected, rel=0.05)  # of the loss: 3%


@pytest.mark.parametrize(("save", "mean"), [(1, 1000), (30, 18000), (60, 900), (300, 3000)])
def test_dalys_interval_is_the_best_of_the_formula(save: float, mean: float) -> None:
    grid = np.geomspace(young(save, mean) / 8, young(save, mean) * 4, 4000)
    times = [expected_time(1, every, save, 60, mean) for every in grid]
    at_daly = expected_time(1, daly(save, mean), save, 60, mean)
    assert at_daly <= min(times) * 1.0005
    assert expected_time(1, young(save, mean), save, 60, mean) >= at_daly * (1 - 1e-9)


def test_without_failures_every_second_has_its_place() -> None:
    asynchronous = lived(costs(1, steps=100, step=2, every=10, block=3, write=8, slow=2))
    # Ten saves; nine are written beside steps, which take 4 seconds more; the last one is waited for.
    assert asynchronous.seconds[0] == 100 * 2 + 10 * 3 + 9 * 4 + 8
    late = lived(costs(1, steps=100, step=2, every=10, block=3, write=50, slow=1))
    assert late.seconds[0] == 10 * 2 + 3 + 9 * (50 + 3) + 50  # each save waits for the one before it
    local = lived(costs(1, steps=100, every=50, block=3, local_every=5, local_block=1, stretch=1.5))
    assert local.seconds[0] == 150 + 2 * 3 + 20
    assert local.losses[LOSSES.index("stragglers")][0] == 50


@pytest.mark.parametrize("spares", [0, 1, 3, 6])
def test_a_spare_is_lacking_as_often_as_erlang_says(spares: int) -> None:
    """Nodes in repair are Poisson (M/G/inf), so a failure finds none left with P(N >= spares)."""
    away = 3.0
    given = costs(400, steps=50_000, every=10, mean=100, repair=100 * away, requeue=1e-6, spares=spares)
    found = lived(given, NODE)
    below = sum(math.exp(-away) * away**count / math.factorial(count) for count in range(spares))
    # What is in repair begins with none: 500 gaps, of which the first few are not yet in balance.
    assert found.waits.sum() / found.failures.sum() == pytest.approx(1 - below, abs=0.015)


@dataclass
class Walk:
    """A life lived step by step, as slowly and plainly as possible: the oracle of `simulate`."""

    given: dict[str, float]
    chance: list[tuple[float, float, float, float]]
    kinds: tuple[Kind, ...]
    survives: bool

    def run(self) -> tuple[float, int]:
        g, time, at, durable, down, nodes_at = self.given, 0.0, 0.0, 0.0, 0.0, 0.0
        away: list[float] = [0.0] * int(g["spares"])
        rate = 1 / g["mean"] + 1 / g["stop_mean"]
        for number, (gap, uniform, repair, unnoticed) in enumerate(self.chance):
            failure = time + gap / rate
            work, durable, handed, over = self.train(time + down, failure, at, durable)
            if over:
                return over, number
            local = max(handed, work // g["local_every"] * g["local_every"]) if g["local_every"] else durable
            time, planned = failure, uniform < (1 / g["stop_mean"]) / rate
            if planned:
                if work > at:
                    at = durable = float(int(work))
                known = time + g["stop"] + g["block"] + g["write"]
                down = known - time + max(0.0, nodes_at - known) + g["start"] + g["load"]
                continue
            kind = self.kind((uniform - (1 / g["stop_mean"]) / rate) * rate * g["mean"])
            wrong = kind.unnoticed_hours * 3600 * unnoticed
            if wrong:
                good = max(0.0, work - wrong / self.pace)
                durable = min(durable, good // g["every"] * g["every"])
            stays = g["local_every"] > 0 and not wrong and (self.survives or not kind.loses_node)
            at, known = local if stays else durable, time + g["detect"]
            if kind.loses_node:
                back = known + g["repair"] * repair
                node = min([*away, back, known + g["requeue"]])
                away = sorted([*away, back])[1:]
                nodes_at = max(nodes_at, max(node, known) + g["swap"])
            down = known - time + max(0.0, nodes_at - known) + g["start"] + g["load_local" if stays else "load"]
        raise AssertionError("too few failures")

    @property
    def pace(self) -> float:
        g = self.given
        return g["step"] * g["stretch"] + (g["local_block"] / g["local_every"] if g["local_every"] else 0.0)

    def kind(self, uniform: float) -> Kind:
        total = sum(kind.share for kind in self.kinds)
        for kind in self.kinds:
            uniform -= kind.share / total
            if uniform < 0:
                return kind
        return self.kinds[-1]

    def train(self, time: float, end: float, at: float, durable: float) -> tuple[float, float, float, float]:
        """Return work, durable and last handed-over step at `end`, or in the fourth place when the job is over."""
        g, work, handed, written, writing = self.given, at, at, -math.inf, durable
        while work < g["steps"] or at == g["steps"]:
            ready = time
            if work < g["steps"]:
                slowed = max(0.0, written - time) / g["slow"]  # seconds of work until the save is written
                ready += self.pace * g["slow"] if self.pace <= slowed else max(0.0, written - time) + self.pace - slowed
                if ready >= end:
                    passed = max(0.0, end - time)
                    beside = min(passed, max(0.0, written - time))
                    done = (beside / g["slow"] + passed - beside) / self.pace
                    return work + done, writing if end >= written else durable, handed, 0.0
                work += 1
            if ready >= written:
                durable = writing
            time = ready
            if work % g["every"] == 0 or work == g["steps"]:
                time = max(time, written) + g["block"]
                if end > max(ready, written):
                    durable = writing
                if time > end:
                    return work, durable, handed, 0.0
                durable, handed, writing, written = writing, work, work, time + g["write"]
                if work == g["steps"]:
                    break
        return (work, durable, handed, written) if written <= end else (work, durable, handed, 0.0)


CASES = st.fixed_dictionaries(
    {
        "steps": st.integers(5, 60),
        "every": st.sampled_from([1, 2, 6]),
        "local_every": st.sampled_from([0, 1]),
        "local_block": st.floats(0, 1),
        "step": st.floats(0.5, 3),
        "stretch": st.floats(1, 1.5),
        "slow": st.floats(1, 2),
        **{name: st.floats(0, 15) for name in ("block", "write", "stop", "start", "load", "load_local", "swap")},
        "detect": st.floats(0, 20),
        "requeue": st.floats(0, 60),
        "repair": st.floats(1, 400),
        "spares": st.integers(0, 3),
        "mean": st.floats(100, 400),
        "stop_mean": st.sampled_from([math.inf, 300.0]),
    }
)


# A failure while the last save, which comes earlier than those before it, is written, and local copies are used.
LAST_SAVE = {
    "steps": 55,
    "every": 2,
    "local_every": 1,
    "spares": 2,
    "stop_mean": 300.0,
    "local_block": 0.7566444191945105,
    "step": 2.76355234415542,
    "stretch": 1.2009784551511862,
    "slow": 1.0683182674378853,
    "detect": 16.026529327730305,
    "requeue": 23.677547324125918,
    "repair": 174.71371510081474,
    "mean": 364.31371164601416,
    "block": 4.108521924407526,
    "write": 8.69926580447791,
    "stop": 3.0096149101489096,
    "start": 0.0,
    "load": 4.7338702928805985,
    "load_local": 1.1384445835834522,
    "swap": 14.453567993992415,
}


@settings(max_examples=100, deadline=None)
@given(case=CASES, seed=st.integers(0, 10**6), survives=st.booleans())
@example(case=LAST_SAVE, seed=43, survives=False)
def test_a_life_is_that_of_a_job_lived_step_by_step(case: dict[str, float], seed: int, survives: bool) -> None:
    lives = 3
    drawn = chances(seed, lives)
    found = lived(costs(lives, kinds=len(MIXED), **case), MIXED, drawn, survives=survives)
    first = [drawn(number) for number in range(int(found.failures.max()) * 3 + 60)]
    for life in range(lives):
        chance = [(one.gap[life], one.kind[life], one.repair[life], one.unnoticed[life]) for one in first]
        seconds, _ = Walk(NOTHING | case, chance, MIXED, survives).run()
        assert found.seconds[life] == pytest.approx(seconds, rel=1e-9)
    np.testing.assert_allclose(found.useful + found.losses.sum(axis=0), found.seconds, rtol=1e-9)
    assert (found.losses >= -1e-9).all()


TIMES = ("detect", "start", "load", "load_local", "swap", "requeue", "repair", "block")


@settings(max_examples=40, deadline=None)
@given(case=CASES, seed=st.integers(0, 10**6), name=st.sampled_from(TIMES), part=st.floats(0, 1))
def test_nothing_that_is_faster_makes_any_life_longer(
    case: dict[str, float], seed: int, name: str, part: float
) -> None:
    case |= {"stop_mean": math.inf}
    slow = lived(costs(20, kinds=3, **case), MIXED, chances(seed, 20))
    fast = lived(costs(20, kinds=3, **(case | {name: case[name] * part})), MIXED, chances(seed, 20))
    assert (fast.seconds <= slow.seconds * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(case=CASES, seed=st.integers(0, 10**6), more=st.integers(1, 4))
def test_more_spares_make_no_life_longer(case: dict[str, float], seed: int, more: int) -> None:
    few = lived(costs(20, kinds=3, **case), MIXED, chances(seed, 20))
    many = lived(costs(20, kinds=3, **(case | {"spares": case["spares"] + more})), MIXED, chances(seed, 20))
    assert (many.seconds <= few.seconds * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(case=CASES, seed=st.integers(0, 10**6), spared=st.integers(0, 8))
def test_a_failure_that_does_not_happen_makes_no_life_longer(case: dict[str, float], seed: int, spared: int) -> None:
    case |= {"local_every": 0, "stop_mean": math.inf}
    drawn = chances(seed, 20)

    def without(number: int) -> Chance:
        if number < spared:
            return drawn(number)
        later = drawn(number + 1)
        return replace(later, gap=later.gap + drawn(number).gap) if number == spared else later

    given_costs = costs(20, kinds=3, **case)
    with_it, without_it = lived(given_costs, MIXED, drawn), lived(given_costs, MIXED, without)
    assert (without_it.seconds <= with_it.seconds * (1 + 1e-9)).all()


def test_fewer_failures_and_weibull_gaps_of_the_same_mean() -> None:
    """A lower rate helps in the mean, and the shape of the gaps leaves their mean as it is."""
    given_costs = costs(2000, steps=20_000, every=100, block=2, start=100, mean=1000)
    often = lived(given_costs).ettr.mean()
    rarely = lived(replace(given_costs, mean=given_costs.mean * 2)).ettr.mean()
    assert rarely > often + 0.05
    clustered = lived(given_costs, chance=chances(7, 2000, shape=0.6))
    spread = math.gamma(1 + 2 / 0.6) / math.gamma(1 + 1 / 0.6) ** 2 - 1  # squared coefficient of variation
    expected = clustered.seconds.mean() / 1000 + (spread - 1) / 2  # renewals since one (Feller II, XI.3)
    assert clustered.failures.mean() == pytest.approx(expected, rel=0.02)


def test_a_life_without_hope_is_given_up() -> None:
    given_costs = costs(50, steps=3000, every=3000, mean=100)
    found = simulate(given_costs, PLAIN, chances(1, 50), np.full(50, 5000.0))
    assert not found.finished.any() and (found.useful == 0).all() and (found.seconds > 5000).all()
    np.testing.assert_allclose(found.losses.sum(axis=0), found.seconds)

"""The best number of steps between saves, and of spare nodes: every choice lives through the same failures."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from liaoyuan.compute.plan.goodput.closed_form import daly
from liaoyuan.compute.plan.goodput.estimate import Run, chances_of, costs_of, live, with_every, with_spares
from liaoyuan.compute.plan.goodput.simulate import Costs, Lives
from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.rundir import Report, silent

LIVES = 256
ENOUGH = 60  # mean times between failures: a job of so many is long
LONG = 3.0  # times as long as without failures: beyond it a choice is bad enough
WORST = 10 * LONG  # what a life counts as that keeps nothing
FLAT = 0.002  # what costs no more than this share of the time is as good as the best
SPARES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Choice:
    """A choice and what it comes to in the mean: ETTR, times as long as without any trouble, its standard error.

    price: what is to be least; card-hours beside those without trouble and spares.
    """

    value: int
    ettr: float
    longer: float
    error: float
    price: float


@dataclass(frozen=True)
class Choices:
    """All that were tried, in order; the best; the least and most of those that are as good but for `FLAT`.

    formula: what Daly's formula gives for medians (of saves), or None.
    """

    tried: tuple[Choice, ...]
    best: Choice
    as_good: tuple[int, int]
    formula: int | None = None


def best_every(run: Run, cluster: Cluster, lives: int = LIVES, seed: int = 0, report: Report = silent) -> Choices:
    """Return how many steps between durable saves are best, in time: of those that the job has, of Daly's by factors of
    two, and finer around the best of these.

    A job longer than `ENOUGH` times the mean between failures is cut to that: the best does not depend on it.
    """
    costs = costs_of(run, cluster, lives, seed)
    step, mean = float(np.median(costs.step * costs.stretch)), float(np.median(costs.mean))
    costs = replace(costs, steps=np.minimum(costs.steps, math.ceil(ENOUGH * mean / step)))
    formula = _daly_every(costs)
    unit, most = max(1, run.local_every), int(costs.steps[0])

    def tried(centre: int, powers: list[float], known: dict[int, Choice]) -> None:
        values = {max(unit, round(min(centre * 2**power, most) / unit) * unit) for power in powers} - set(known)
        every = sorted(values)
        if every:
            chance = chances_of(cluster, lives, seed, len(every))
            found = live(with_every(costs, every), cluster, chance, report, hopeless=LONG)
            known.update({choice.value: choice for choice in _tried(every, found, [1.0] * len(every))})

    known = dict[int, Choice]()
    tried(min(run.every, most), [0], known)
    tried(formula, [-3, -2, -1, 0, 1, 2, 3], known)
    tried(_least(known.values()).value, [-0.75, -0.5, -0.25, 0.25, 0.5, 0.75], known)
    return _chosen(sorted(known.values(), key=lambda choice: choice.value), formula)


def formula_every(run: Run, cluster: Cluster, lives: int = LIVES, seed: int = 0) -> int:
    """Return how many steps between durable saves Daly's formula gives: at most all, and where local saves fall."""
    unit = max(1, run.local_every)
    return max(unit, round(min(_daly_every(costs_of(run, cluster, lives, seed)), run.steps) / unit) * unit)


def _daly_every(costs: Costs) -> int:
    # What a save costs: the time that it blocks, and by how much it slows the steps beside it.
    price = float(np.median(costs.block + costs.write * (1 - 1 / costs.slow)))
    step, mean = float(np.median(costs.step * costs.stretch)), float(np.median(costs.mean))
    return max(1, round(daly(price, mean) / step))


def best_spares(run: Run, cluster: Cluster, lives: int = LIVES, seed: int = 0, report: Report = silent) -> Choices:
    """Return how many spare nodes give the job for the fewest card-hours, theirs included."""
    costs = costs_of(run, cluster, lives, seed)
    kinds = cluster.recovery.kinds
    lost = sum(kind.share for kind in kinds if kind.loses_node) / sum(kind.share for kind in kinds)
    away = float(np.quantile(lost * costs.repair / costs.mean, 0.95))  # nodes in repair at a time (Little's law)
    most = next((count for count in SPARES if count >= away + 3 * math.sqrt(away)), SPARES[-1])
    values = sorted({count for count in SPARES if count <= most} | {cluster.recovery.spares})
    chance = chances_of(cluster, lives, seed, len(values))
    found = live(with_spares(costs, values), cluster, chance, report, hopeless=LONG)
    nodes = run.nodes(cluster)
    return _chosen(_tried(values, found, [(nodes + value) / nodes for value in values]), None)


def with_choice(run: Run, cluster: Cluster, every: int | None = None, spares: int | None = None) -> tuple[Run, Cluster]:
    """Return job and cluster with another number of steps between saves, or of spares."""
    if every is not None:
        run = replace(run, every=every)
    if spares is not None:
        recovery = cluster.recovery.model_copy(update={"spares": spares})
        cluster = cluster.model_copy(update={"recovery": recovery})
    return run, cluster


def _tried(values: list[int], found: Lives, weights: list[float]) -> list[Choice]:
    count = len(values)
    longer = (1 / np.maximum(found.goodput, 1 / WORST)).reshape(count, -1)
    errors = longer.std(axis=1) / math.sqrt(longer.shape[1])
    ettr = found.ettr.reshape(count, -1).mean(axis=1)
    parts = zip(values, ettr, longer.mean(axis=1), errors, weights, strict=True)
    return [Choice(value, float(e), float(mean), float(se), float(mean * w)) for value, e, mean, se, w in parts]


def _least(tried: Iterable[Choice]) -> Choice:
    return min(tried, key=lambda choice: choice.price)


def _chosen(tried: list[Choice], formula: int | None) -> Choices:
    best = _least(tried)
    good = [choice.value for choice in tried if choice.price <= best.price * (1 + FLAT)]
    return Choices(tuple(tried), best, (min(good), max(good)), formula)

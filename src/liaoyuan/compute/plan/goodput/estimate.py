"""What becomes of a job on a cluster: its beliefs drawn once for each life, the lives lived, and the results summed up.

What is uncertain about the cluster (how often nodes fail, how long a restart takes, what storage gives) is drawn for
each life and stays so for all of it, so that intervals say what is not known and not only what is chance.
"""

import math
import zlib
from dataclasses import dataclass, fields, replace
from statistics import NormalDist

import numpy as np

from liaoyuan.checkpoint.training_state import CheckpointConfig
from liaoyuan.compute.plan.goodput.simulate import LOSSES, Chances, Costs, Lives, chances, simulate
from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.span import Floats, Span
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Report, silent
from liaoyuan.training.loop import TrainConfig

DAY = 86400.0  # seconds
GB = 1e9  # bytes
LIVES = 2000
HOPELESS = 4.0  # times as long as without failures, after which a life counts as never ending
TAIL = 0.01  # of a belief on either side, which counts as its edge: a range says nothing of what is far outside it
MOST_FAILURES = 50_000  # of one life, likewise
DOWN = ("detection", "waiting for nodes", "restart", "planned stops")  # losses in which cards wait


@dataclass(frozen=True)
class Run:
    """A job as far as failures matter.

    step: seconds, without failures, saves and slow nodes. every: steps between durable saves; local_every: between
    local ones (0: none). state_bytes: of a checkpoint, all processes together.
    """

    steps: int
    step: Span
    processes: int
    state_bytes: float
    every: int
    asynchronous: bool = True
    local_every: int = 0

    @classmethod
    def of(cls, train: TrainConfig, saving: CheckpointConfig, step: Span, processes: int, state_bytes: float) -> "Run":
        """Return a run as its file describes it."""
        every, local = min(train.checkpoint_every, train.steps), saving.local_every if saving.local else 0
        return cls(train.steps, step, processes, state_bytes, every, saving.asynchronous, local)

    def nodes(self, cluster: Cluster) -> int:
        return math.ceil(self.processes / cluster.per_node)


@dataclass(frozen=True)
class Goodput:
    """What becomes of a job. Shares are of the time from the first step to the last save.

    ettr: effective training time ratio, time in steps that were kept. goodput: time that the job would have needed if
    nothing had ever failed, been saved or been slow. mtbf_hours: what was believed of failures, planned stops not
    counted. losses: by cause, the mean and the interval of its share. energy_mwh: of the cards; cost: of the cards,
    spares too, in the currency of their price (0: none was given). unfinished: share of lives that came to no end;
    their days count as infinite.
    """

    every: int
    spares: int
    lives: int
    ideal_days: Span
    ettr: Span
    goodput: Span
    days: Span
    failures: Span
    waits: Span
    mtbf_hours: Span
    save_seconds: Span
    write_seconds: Span
    energy_mwh: Span
    cost: Span
    losses: dict[str, tuple[float, Span]]
    unfinished: float


def middle_of(values: Floats) -> Span:
    """Return the median of the lives, and the bounds of the middle 90% of them: each the value of a life."""
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95], method="closest_observation")
    return Span(float(low), float(median), float(high))


def goodput(run: Run, cluster: Cluster, lives: int = LIVES, seed: int = 0, report: Report = silent) -> Goodput:
    """Return what becomes of the job, from so many lives of it.

    Raises:
        LiaoyuanError: the job has no steps or takes no time.
    """
    costs = costs_of(run, cluster, lives, seed)
    return summed_up(run, cluster, costs, live(costs, cluster, chances_of(cluster, lives, seed), report))


def chances_of(cluster: Cluster, lives: int, seed: int, copies: int = 1) -> Chances:
    return chances(seed, lives, copies, cluster.failures.shape)


def live(costs: Costs, cluster: Cluster, chance: Chances, report: Report = silent, hopeless: float = HOPELESS) -> Lives:
    """Live the lives, none longer than `hopeless` times what it would take without failures."""
    ideal = costs.steps * costs.step * costs.stretch
    horizon = np.minimum(hopeless * ideal, MOST_FAILURES * costs.mean)
    recovery = cluster.recovery
    return simulate(costs, recovery.kinds, chance, horizon, recovery.local_survives, report)


def costs_of(run: Run, cluster: Cluster, lives: int, seed: int = 0) -> Costs:
    """Draw what each life meets from the beliefs about the cluster."""
    if run.steps < 1 or run.step.low <= 0 or run.every < 1:
        raise LiaoyuanError("A job needs at least one step that takes time, and a step or more between saves.")
    if run.local_every > 0 and run.every % run.local_every:
        raise LiaoyuanError(
            f"Saves every {run.every} steps must fall on local ones, which are every {run.local_every}: "
            "make train.checkpoint_every a multiple of checkpoint.local_every."
        )
    recovery, storage, nodes = cluster.recovery, cluster.storage, run.nodes(cluster)

    def drawn(name: str, span: Span) -> Floats:
        return span.at(_spread(lives, np.random.default_rng([seed, zlib.crc32(name.encode())])))

    def constant(value: float) -> Floats:
        return np.full(lives, float(value))

    share = drawn("storage_share", recovery.storage_share)
    write = run.state_bytes / GB / (share * min(storage.write_gb, nodes * storage.node_gb))
    read = run.state_bytes / GB / (share * min(storage.read_gb, nodes * storage.node_gb))
    copy = drawn("stall", recovery.stall) + run.state_bytes / GB / run.processes / drawn("copy_gb", recovery.copy_gb)
    slowed = drawn("slow_share", recovery.slow_share) * (drawn("slow_factor", recovery.slow_factor) - 1)
    rate = drawn("failures", cluster.failures.rate) * nodes / 1000 / DAY
    stops = recovery.stops_per_month / (30 * DAY)
    detect = [drawn(f"detect {kind.name}", kind.detect) for kind in recovery.kinds]
    return Costs(
        steps=constant(run.steps),
        step=drawn("step", run.step),
        stretch=1 + slowed,
        every=constant(run.every),
        block=copy if run.asynchronous else copy + write,
        write=write if run.asynchronous else constant(0),
        slow=drawn("slow_while_saving", recovery.slow_while_saving),
        local_every=constant(run.local_every),
        local_block=copy,
        mean=1 / rate,
        stop_mean=constant(1 / stops if stops else math.inf),
        stop=drawn("stop", recovery.stop),
        detect=np.stack(detect, axis=1),
        start=drawn("start", recovery.start),
        load=read,
        load_local=copy,
        swap=drawn("swap", recovery.swap),
        requeue=drawn("requeue", recovery.requeue),
        repair=drawn("repair_hours", recovery.repair_hours) * 3600,
        spares=constant(recovery.spares),
    )


def _spread(count: int, numbers: np.random.Generator) -> Floats:
    """Return normal values, one from each of `count` equally likely ranges (a Latin hypercube), none in the last 1%."""
    uniform = (numbers.permutation(count) + numbers.random(count)) / count
    inverse = NormalDist().inv_cdf
    return np.array([inverse(min(max(value, TAIL), 1 - TAIL)) for value in uniform.tolist()])


def copies_of(costs: Costs, count: int) -> Costs:
    """Return so many copies of the costs, one after the other."""
    parts = (getattr(costs, field.name) for field in fields(costs))
    return Costs(*(np.concatenate([part] * count) for part in parts))


def with_every(costs: Costs, every: list[int]) -> Costs:
    """Return the costs once for each of these numbers of steps between saves."""
    return replace(copies_of(costs, len(every)), every=np.repeat(np.array(every, float), costs.lives))


def with_spares(costs: Costs, spares: list[int]) -> Costs:
    """Return the costs once for each of these numbers of spare nodes."""
    return replace(copies_of(costs, len(spares)), spares=np.repeat(np.array(spares, float), costs.lives))


def summed_up(run: Run, cluster: Cluster, costs: Costs, lives: Lives) -> Goodput:
    """Return what the lives come to."""
    card, nodes = cluster.accelerator, run.nodes(cluster)
    spares = int(costs.spares[0])
    days = np.where(lives.finished > 0, lives.seconds / DAY, np.inf)
    shares = lives.losses / lives.seconds
    waited = sum(lives.losses[LOSSES.index(name)] for name in DOWN)
    spare_cards = spares * cluster.per_node
    idle = card.watts * cluster.recovery.idle_power
    joules = (
        run.processes * (card.watts * (lives.seconds - waited) + idle * waited) + spare_cards * idle * lives.seconds
    )
    paid = (nodes + spares) * cluster.per_node * card.price_per_hour * lives.seconds / 3600
    ends = lives.finished > 0
    return Goodput(
        every=run.every,
        spares=spares,
        lives=costs.lives,
        ideal_days=middle_of(costs.steps * costs.step / DAY),
        ettr=middle_of(lives.ettr),
        goodput=middle_of(lives.goodput),
        days=middle_of(days),
        failures=middle_of(lives.failures),
        waits=middle_of(lives.waits),
        mtbf_hours=middle_of(costs.mean / 3600),
        save_seconds=middle_of(costs.block),
        write_seconds=middle_of(costs.write),
        energy_mwh=middle_of(np.where(ends, joules / 3.6e9, np.inf)),
        cost=middle_of(np.where(ends, paid, np.inf) if card.price_per_hour else np.zeros_like(paid)),
        losses={name: (float(share.mean()), middle_of(share)) for name, share in zip(LOSSES, shares, strict=True)},
        unfinished=float(1 - lives.finished.mean()),
    )

"""How cards may serve a model, what each way would give for a trace of requests, and which is best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from liaoyuan.compute.plan.machine.cluster import GIB, Cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile
from liaoyuan.compute.plan.serving.asks import Ask
from liaoyuan.compute.plan.serving.engine_rates import EngineRates
from liaoyuan.compute.plan.serving.model_work import Served, check_served
from liaoyuan.compute.plan.serving.replica import Replica
from liaoyuan.compute.plan.serving.simulation import Outcome, serve, serve_apart
from liaoyuan.compute.plan.serving.step_price import StepPrice
from liaoyuan.compute.plan.span import Z90, Span, exactly
from liaoyuan.compute.plan.step.spread import Spread, ends_of, spread
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.sizes import EngineConfig
from liaoyuan.rundir import Progress, Report, silent

Kinds = list[tuple[np.ndarray, np.ndarray, int]]  # steps, as a price takes them
EXACT = exactly(1.0)
STEPS_TOLD = 200  # by which it is told how a figure moves a step


@dataclass(frozen=True)
class Way:
    """So many replicas of `tp` processes, with experts over `ep` of them; `prefill` of the replicas compute prompts
    alone (0: all do all).
    """

    replicas: int
    tp: int = 1
    ep: int = 1
    prefill: int = 0

    def describe(self) -> str:
        many = f"{self.prefill} prefill + {self.replicas - self.prefill} decode" if self.prefill else f"{self.replicas}"
        return f"{many} x tp {self.tp}" + (f", ep {self.ep}" if self.ep > 1 else "")


@dataclass(frozen=True)
class Machines:
    """What serves: the cluster, and what is known of its cards and of the engine on them."""

    cluster: Cluster
    profile: DeviceProfile
    rates: EngineRates

    @property
    def certain(self) -> "Machines":
        """The same with every figure at its median."""
        return replace(self, profile=self.profile.median())

    def ends(self) -> dict[str, tuple["Machines", "Machines"]]:
        """Return by uncertain figure, of cards or engine, the machines with it alone at either end of its range."""
        certain = self.certain
        found = {
            name: tuple(replace(self, profile=end) for end in ends) for name, ends in ends_of(self.profile).items()
        }
        for name, figure in self.rates.figures().items():
            if figure.sigma:
                found[name] = tuple(replace(certain, rates=self.rates.moved(name, z)) for z in (-Z90, Z90))
        return found  # type: ignore[return-value]


@dataclass(frozen=True)
class Planned:
    """What a way gives: as the figures' medians have it, and where all steps are as short or as long as they may be.

    factor: by what 90% of the steps' times are shorter or longer at most. width: by figure, the share of that
    uncertainty that comes from it, largest first. why_not: why it cannot be, if not.
    """

    way: Way
    median: Outcome | None = None
    fast: Outcome | None = None
    slow: Outcome | None = None
    factor: Span = EXACT
    width: dict[str, float] = field(default_factory=dict)
    why_not: str = ""


def ways(served: Served, processes: int, apart: bool = False) -> list[Way]:
    """Return how so many processes may serve a model: replicas of 1, 2, 4 ... processes, experts over all of each;
    apart: also with every ratio of prefill to decode, of replicas of one process.
    """
    found, tp = list[Way](), 1
    while tp <= processes:
        if processes % tp == 0 and _can_be(replace(served, tp=tp, ep=1)):
            over = served.model.experts is not None and tp > 1 and _can_be(replace(served, tp=tp, ep=tp))
            found.append(Way(processes // tp, tp, tp if over else 1))
        tp *= 2
    if apart:
        found += [Way(processes, 1, 1, prefill) for prefill in range(1, processes)]
    if not found:
        raise LiaoyuanError(f"{processes} processes cannot serve this model: none of 1, 2, 4 ... divides its heads.")
    return found


def blocks_of(served: Served, config: EngineConfig, cluster: Cluster, cache_bytes: float | None = None) -> int:
    """Return how many blocks the cache of a replica has: what a card's memory leaves beside the weights and a step.

    cache_bytes: of each process, if less is to be taken.
    """
    room = cluster.accelerator.usable_bytes - served.weight_bytes
    room -= served.step_bytes(config.max_batch_tokens, config.max_sequences)
    return int(min(room, math.inf if cache_bytes is None else cache_bytes) // (served.token_bytes * config.block_size))


def plan_way(
    asks: Sequence[Ask],
    served: Served,
    way: Way,
    machines: Machines,
    config: EngineConfig,
    cache_bytes: float | None = None,
    interval: bool = True,
) -> Planned:
    """Return what a way gives for a trace; interval: also at both ends of what the figures leave open."""
    served = replace(served, tp=way.tp, ep=way.ep)
    check_served(served)
    blocks = blocks_of(served, config, machines.cluster, cache_bytes)
    longest = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    if blocks * config.block_size < longest:
        gib = served.weight_bytes / GIB
        return Planned(
            way,
            why_not=f"{gib:,.1f} GiB of weights leave a card room for {max(0, blocks) * config.block_size:,} tokens, "
            f"and the longest request has {longest:,}",
        )
    price = StepPrice(served, machines.cluster, machines.certain.profile, machines.rates)
    median, kinds = _simulate(asks, way, price, config, blocks, 1.0)
    if not interval:
        return Planned(way, median)
    steps = _spread(served, machines, kinds)
    factor = steps.span.times(1 / steps.median)
    fast, slow = (_simulate(asks, way, price, config, blocks, end)[0] for end in (factor.low, factor.high))
    return Planned(way, median, fast, slow, factor, steps.shares)


def plan_ways(
    asks: Sequence[Ask],
    served: Served,
    among: Sequence[Way],
    machines: Machines,
    config: EngineConfig,
    cache_bytes: float | None = None,
    report: Report = silent,
) -> list[Planned]:
    """Return what several ways give, the best first: by mean seconds to the last token; the best with its interval."""
    found = list[Planned]()
    for number, way in enumerate(among, 1):
        found.append(plan_way(asks, served, way, machines, config, cache_bytes, interval=False))
        report(Progress(number, len(among), "way", way.describe()))
    found.sort(key=lambda one: one.median.whole.mean if one.median else math.inf)
    if found[0].median:
        found[0] = plan_way(asks, served, found[0].way, machines, config, cache_bytes)
    return found


def _simulate(
    asks: Sequence[Ask], way: Way, price: StepPrice, config: EngineConfig, blocks: int, factor: float
) -> tuple[Outcome, Kinds]:
    """Serve the trace, with every step `factor` times as long as its price."""
    longest = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    most = min(longest, price.served.model.max_position_embeddings)
    replicas = [Replica(lambda *step: factor * price(*step), config, blocks, most) for _ in range(way.replicas)]
    if way.prefill:
        fabric = Fabric(price.cluster, price.profile)

        def hand_over(tokens: int) -> float:
            return fabric.transfer("send", float(tokens * price.served.token_bytes), (0, way.tp)).seconds

        outcome = serve_apart(asks, replicas[: way.prefill], replicas[way.prefill :], hand_over)
    else:
        outcome = serve(asks, replicas)
    return outcome, [kind for replica in replicas for kind in replica.kinds]


def _spread(served: Served, machines: Machines, kinds: Kinds) -> Spread:
    """Return how long steps of these kinds take together, and how sure that is."""
    chosen = kinds[:: max(1, len(kinds) // STEPS_TOLD)]

    def seconds(on: Machines) -> float:
        price = StepPrice(served, on.cluster, on.profile, on.rates)
        return sum(price(*kind) for kind in chosen)

    ends = {name: (seconds(low), seconds(high)) for name, (low, high) in machines.ends().items()}
    return spread(seconds(machines.certain), ends)


def _can_be(served: Served) -> bool:
    try:
        check_served(served)
    except LiaoyuanError:
        return False
    return True

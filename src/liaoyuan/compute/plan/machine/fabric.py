"""How long a message takes among cards that several levels of a network join.

Every collective of a group is that of all its sisters too: the program is the same everywhere, so while one group of an
axis talks, all do. What a card sends over each level follows from how the group lies in the nodes; the algorithm is the
faster of those that the libraries have. Latency and bandwidth: Hockney 1994; costs of the algorithms: Thakur et al.
2005, "Optimization of collective communication operations in MPICH"; trees: Sanders et al. 2009, "Two-tree algorithms
for full bandwidth broadcast, reduction and scan".

All-gather and reduce-scatter go round a ring through all cards, whose latency grows with their number: that is what
sharding over a thousand cards pays. All-reduce may climb trees instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.profile import DeviceProfile, KindRate

TREE = 0.92  # of the bandwidth of a ring, what trees get: some of their branches wait
PLAIN = KindRate()
Levels = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Transfer:
    """A collective on its way: seconds that pass whatever its size, and by level the seconds that its bytes need there
    if nobody else sends. Levels work at the same time; those who share one get equal parts of it.
    """

    latency: float
    loads: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        """How long it takes alone."""
        return self.latency + max((load for _, load in self.loads), default=0.0)


@dataclass(frozen=True)
class Way:
    """An algorithm: for each level, nearest first, the share of a card's bytes that cross it and the steps that wait
    for it.
    """

    crossing: tuple[tuple[float, float], ...]


class Fabric:
    """The network of a cluster whose links give what the profile says of them.

    At a level that is oversubscribed, all get together only that part of what each would get alone.
    """

    def __init__(self, cluster: Cluster, profile: DeviceProfile) -> None:
        self.cluster, self.profile = cluster, profile
        self._reaches = tuple(link.reach for link in cluster.links)
        self._links = [
            (link.name, link.bandwidth_gb * 1e9 / link.oversubscription, profile.links[link.name])
            for link in cluster.links
        ]

    def transfer(self, kind: str, sent: float, ranks: Sequence[int]) -> Transfer:
        """Return what a collective takes in which each of `ranks` sends so many bytes (as `parallel.traffic` counts).

        kind: as `parallel.traffic` names them: all-gather, reduce-scatter, all-reduce, all-to-all (of counts), send or
            broadcast. ranks: a tuple, or (faster, if they are many) a range.
        """
        kind = kind.removesuffix(" of counts")
        levels = _members(ranks if isinstance(ranks, range) else tuple(ranks), self._reaches)
        found = [self._taken(way, kind, sent) for way in ways(kind, levels)]
        return min(found, key=lambda transfer: transfer.seconds)

    def _taken(self, way: Way, kind: str, sent: float) -> Transfer:
        loads, latency = list[tuple[str, float]](), 0.0
        for (name, speed, rate), (share, steps) in zip(self._links, way.crossing, strict=True):
            own = rate.kinds.get(kind, PLAIN)
            if share:
                loads.append((name, sent * share / (speed * rate.share.median * own.share)))
            latency += steps * rate.latency.median * own.latency
        return Transfer(latency, tuple(loads))


@lru_cache(maxsize=16384)
def _members(ranks: Sequence[int], reaches: tuple[int, ...]) -> Levels:
    """Return for each level how many parts of the level below form a part of it, and how many parts it has."""
    found, parts_before = list[tuple[int, int]](), len(ranks)
    for reach in reaches:
        parts = len({rank // reach for rank in ranks}) if reach else 1
        found.append((math.ceil(parts_before / parts), parts))
        parts_before = parts
    return tuple(found)


@lru_cache(maxsize=4096)
def ways(kind: str, levels: Levels) -> tuple[Way, ...]:
    """Return the algorithms of a collective in a group that lies so in the levels (see `_members`)."""
    if kind == "all-to-all":
        return (Way(_all_to_all(levels)),)
    if kind in ("send", "broadcast"):
        return (Way(_down(kind, levels)),)
    shares = _ring_shares(levels)
    twice = 2 if kind == "all-reduce" else 1
    found = [Way(tuple((share, twice * hops) for share, hops in zip(shares, _hops(levels), strict=True)))]
    if kind == "all-reduce":
        found.append(
            Way(tuple((share / TREE, 2 * steps) for share, steps in zip(shares, _climbs(levels), strict=True)))
        )
    return tuple(found)


def _ring_shares(levels: Levels) -> list[float]:
    """Return of each level the share of a card's bytes that cross it: inside first, then each card sends its own part
    of the whole to its sisters elsewhere, over a link of its own.
    """
    size, inside, found = math.prod(width for width, _ in levels), 1, list[float]()
    for width, _ in levels:
        found.append((width - 1) / (width * inside) / ((size - 1) / size) if size > 1 else 0.0)
        inside *= width
    return found


def _hops(levels: Levels) -> list[int]:
    """Return of each level how often a ring through all cards crosses it."""
    below, found = math.prod(width for width, _ in levels), list[int]()
    for width, parts in levels:
        found.append(max(below - parts, 0) if width > 1 else 0)
        below = parts
    return found


def _climbs(levels: Levels) -> list[int]:
    """Return of each level how many steps lead up it: along all cards of the nearest, then from branch to branch."""
    found, nearest = list[int](), True
    for width, _ in levels:
        found.append(0 if width == 1 else width - 1 if nearest else math.ceil(math.log2(width)) + 1)
        nearest = nearest and width == 1
    return found


def _all_to_all(levels: Levels) -> tuple[tuple[float, float], ...]:
    """Return the crossings of an exchange of each with each: of the others, most are first met at the far levels."""
    size, inside, found = math.prod(width for width, _ in levels), 1, list[tuple[float, float]]()
    for width, _ in levels:
        outside = inside * width
        found.append(((outside - inside) / (size - 1), 1.0) if width > 1 else (0.0, 0.0))
        inside = outside
    return tuple(found)


def _down(kind: str, levels: Levels) -> tuple[tuple[float, float], ...]:
    """Return the crossings of what one sends: to another, or down a tree to all."""
    inside, found = 1, list[tuple[float, float]]()
    for width, _ in levels:
        share = 1.0 if kind == "send" else 1.0 / inside
        found.append((share, math.ceil(math.log2(width))) if width > 1 else (0.0, 0.0))
        inside *= width
    return tuple(found)

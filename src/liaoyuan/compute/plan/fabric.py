"""How long a message takes among cards that several levels of a network join.

Every collective of a group is that of all its sisters too: the program is the same everywhere, so while one group of an
axis talks, all do. What a card sends over each level follows from how the group lies in the nodes; the algorithm is the
faster of ring and tree, or of both levels one after the other (hierarchical), as the libraries choose. Latency and
bandwidth: Hockney 1994; costs of the algorithms: Thakur et al. 2005, "Optimization of collective communication
operations in MPICH".
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from liaoyuan.compute.plan.cluster import Cluster
from liaoyuan.compute.plan.profile import DeviceProfile


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


class Fabric:
    """The network of a cluster whose links give what the profile says of them."""

    def __init__(self, cluster: Cluster, profile: DeviceProfile) -> None:
        self.cluster, self.profile = cluster, profile

    def transfer(self, kind: str, sent: float, ranks: tuple[int, ...]) -> Transfer:
        """Return what a collective takes in which each of `ranks` sends so many bytes (as `parallel.traffic` counts).

        kind: as `parallel.traffic` names them: all-gather, reduce-scatter, all-reduce, all-to-all (of counts), send or
            broadcast.
        """
        shares = crossing(kind.removesuffix(" of counts"), tuple(self._members(ranks)))
        loads, latency = list[tuple[str, float]](), 0.0
        for link, (share, steps) in zip(self.cluster.links, shares, strict=True):
            rate = self.profile.links[link.name]
            speed = link.bandwidth_gb * 1e9 / link.oversubscription * rate.share.median
            if share:
                loads.append((link.name, sent * share / speed))
            latency += steps * rate.latency.median
        return Transfer(latency, tuple(loads))

    def _members(self, ranks: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return for each level into how many parts a part of the next one falls, and cards of a group in a part."""
        return _members(ranks, tuple(link.reach for link in self.cluster.links))


@lru_cache(maxsize=4096)
def _members(ranks: tuple[int, ...], reaches: tuple[int, ...]) -> list[tuple[int, int]]:
    found, parts_before = list[tuple[int, int]](), len(ranks)
    for reach in reaches:
        parts = len({rank // reach for rank in ranks}) if reach else 1
        found.append((math.ceil(parts_before / parts), parts))
        parts_before = parts
    return found


@lru_cache(maxsize=4096)
def crossing(kind: str, levels: tuple[tuple[int, int], ...]) -> tuple[tuple[float, float], ...]:
    """Return for each level, nearest first, the share of a card's bytes that cross it, and the steps that wait for it.

    levels: for each, how many parts of the level below form a part of it, and how many of its parts there are.
    """
    size = math.prod(width for width, _ in levels)
    found, inside, inside_parts = list[tuple[float, float]](), 1, size
    for width, parts in levels:
        outside = inside * width
        if width == 1:
            found.append((0.0, 0.0))
        elif kind == "all-to-all":  # (outside - inside) of the (size - 1) others are first met at this level
            found.append(((outside - inside) / (size - 1), 1.0))
        elif kind in ("send", "broadcast"):
            found.append((1.0 if kind == "send" else 1.0 / inside, math.ceil(math.log2(width))))
        else:  # hierarchical: inside first, then each card its own part of the whole with its sisters elsewhere
            part = (width - 1) / (width * inside) / ((size - 1) / size)
            hops = inside_parts - parts  # of a ring through all cards
            found.append((part, min(2 * hops, 4 * math.ceil(math.log2(width)) + 4) if kind == "all-reduce" else hops))
        inside, inside_parts = outside, parts
    return tuple(found)

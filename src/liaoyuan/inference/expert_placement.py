"""Which rank of an expert-parallel group holds which experts: even loads by copies of busy experts, few moves.

A placement is int32 [layers, ranks, slots], the expert in each slot. An expert's tokens are shared out evenly among
its copies, so the busiest rank, for which all others wait, has `imbalance` times the work of the mean one. The problem
and its parts (copies of busy experts, groups kept on one node) are those of DeepSeek-AI 2024 (arXiv 2412.19437,
sec. 3.4); the method is our own: steps from the placement there is, each of one or two moves and each an improvement,
so that one may stop after any of them. Loads may be given for several domains of text and spans of time; then the
worst one counts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from liaoyuan.errors import LiaoyuanError

SMALLEST_GAIN = 1e-9  # less is rounding


@dataclass(frozen=True)
class Move:
    """Slot `slot` of rank `rank` receives the weights of `expert`, which another rank has."""

    rank: int
    slot: int
    expert: int


@dataclass(frozen=True)
class Step:
    """Moves of one layer that belong together: one replaces a copy, two exchange experts between ranks.

    gain: how much imbalance it takes off its layer.
    """

    layer: int
    moves: tuple[Move, ...]
    gain: float


class LoadAverage:
    """Moving averages of the experts' loads, per domain: what the next windows may ask for.

    half_lives: after so many windows of a domain a window counts half. An average of few windows sees what is new, one
    of many is steady; a placement that is even in both lasts longer than one that is even in one between them.
    """

    def __init__(self, *half_lives: float) -> None:
        self._keep = 0.5 ** (1 / np.array(half_lives))[:, None, None]
        self._sums: dict[str, np.ndarray] = {}

    def add(self, counts: np.ndarray, domain: str = "") -> None:
        """Take up a window's counts [layers, experts]."""
        self._sums[domain] = self._sums.get(domain, 0.0) * self._keep + counts * (1 - self._keep)

    def load(self) -> np.ndarray:
        """Return the loads, fp64 [domains * half-lives, layers, experts], each layer's of sum one, for `rebalance`."""
        sums = np.concatenate(list(self._sums.values()))
        return sums / np.maximum(sums.sum(-1, keepdims=True), np.finfo(float).tiny)


def rank_loads(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Return the work of each rank as a multiple of the mean: fp64 [..., layers, ranks].

    placement: int [layers, ranks, slots]; load: [..., layers, experts], not negative; a layer without load is even.
    """
    ranks = placement.shape[1]
    held = _held(placement, load.shape[-1])
    each = load / held.sum(-1)
    work = np.einsum("...le,ler->...lr", each, held)
    mean = load.sum(-1, keepdims=True) / ranks
    return np.where(mean > 0, work / np.where(mean > 0, mean, 1), 1.0)


def imbalance(placement: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Return the busiest rank's work over the mean, fp64 [..., layers]; arguments as in `rank_loads`."""
    return rank_loads(placement, load).max(-1)


def count_moves(before: np.ndarray, after: np.ndarray) -> int:
    """Return how many experts must be sent: those a rank has after, but not before; int [layers, ranks, slots]."""
    experts = int(max(before.max(), after.max())) + 1
    return int(((_held(after, experts) > 0) & (_held(before, experts) == 0)).sum())


def place(load: np.ndarray, ranks: int, slots: int, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """Return an even placement, int32 [layers, ranks, slots], from nothing.

    load: [layers, experts] or [domains, layers, experts]. With several nodes, each of `groups` contiguous groups of
    experts stays on one node, so that group-limited routing sends a token to few nodes.

    Raises:
        LiaoyuanError: the sizes do not fit.
    """
    load = _domains(load)
    experts = load.shape[-1]
    _check_sizes(experts, ranks, slots, nodes, groups)
    layers = []
    for index in range(load.shape[1]):
        mean = _normal(load[:, index]).max(0)
        layer = np.empty((ranks, slots), dtype=np.int32)
        for rows, members in zip(np.split(layer, nodes), _node_members(mean, nodes, groups), strict=True):
            rows[:] = _fill(members, mean[members], *rows.shape)
        layers.append(layer)
    placement = np.stack(layers)
    return apply(placement, rebalance(placement, load, 0.0, nodes))


def rebalance(placement: np.ndarray, load: np.ndarray, price: float, nodes: int = 1) -> list[Step]:
    """Return the steps from a placement to a more even one that are worth their price; perhaps none.

    price: how much imbalance a move must take off to pay for itself, see `move_price`. Of the path of ever better
    placements that single steps lead along, each layer goes as far as imbalance + price * moves is least. With several
    nodes, experts stay on theirs.

    Raises:
        LiaoyuanError: in the given placement an expert has no copy.
    """
    return [step for steps in rebalance_slowly(placement, load, price, nodes) for step in steps]


def rebalance_slowly(placement: np.ndarray, load: np.ndarray, price: float, nodes: int = 1) -> Iterator[list[Step]]:
    """Yield what `rebalance` returns in parts, most of them empty, so that something else can be done between them.

    The steps hold together: they are for the placement from before the first of them.
    """
    load = _domains(load)
    missing = np.argwhere(_held(placement, load.shape[-1]).sum(-1) == 0)
    if len(missing):
        layer, expert = missing[0].tolist()
        raise LiaoyuanError(f"The placement has no copy of expert {expert} in layer {layer}: begin with `place`.")
    for index, layer in enumerate(placement):
        row = _normal(load[:, index])
        busiest = float(imbalance(layer[None], row[:, None]).max())
        yield from _worthwhile(_path(index, layer, row, nodes), price, busiest)


def move_price(expert_bytes: float, bytes_per_second: float, layer_seconds: float, steps: float) -> float:
    """Return the price of a move for `rebalance`: the time it takes, over that in which its gain comes back.

    layer_seconds: what a rank of mean load spends on one layer's experts in one step. steps: how many steps the new
    loads are expected to last.
    """
    return expert_bytes / bytes_per_second / (layer_seconds * steps)


def apply(placement: np.ndarray, steps: Iterable[Step]) -> np.ndarray:
    """Return the placement after some steps."""
    placement = placement.copy()
    for step in steps:
        for move in step.moves:
            placement[step.layer, move.rank, move.slot] = move.expert
    return placement


def lots(steps: list[Step], moves: int) -> Iterator[list[Step]]:
    """Yield the steps in lots of at most `moves` moves (at least two), the most gain per move first.

    A lot is sent while the old placement serves, and taken up at once; then every expert has a place after each lot,
    for a layer's steps keep their order.
    """
    waiting: dict[int, list[Step]] = {}
    for step in steps:
        waiting.setdefault(step.layer, []).append(step)
    lot: list[Step] = []
    while waiting:
        layer = max(waiting, key=lambda layer: _rate(waiting[layer]))
        step = waiting[layer].pop(0)
        if not waiting[layer]:
            del waiting[layer]
        if lot and sum(len(each.moves) for each in lot) + len(step.moves) > max(moves, 2):
            yield lot
            lot = []
        lot.append(step)
    if lot:
        yield lot


def _rate(steps: list[Step]) -> float:
    """The best gain per move that a prefix of a layer's steps brings: a first step may gain nothing by itself."""
    gains = np.cumsum([step.gain for step in steps])
    return float((gains / np.cumsum([len(step.moves) for step in steps])).max())


def _domains(load: np.ndarray) -> np.ndarray:
    load = np.asarray(load, dtype=np.float64)
    return load[None] if load.ndim == 2 else load


def _normal(load: np.ndarray) -> np.ndarray:
    """Loads of one layer [domains, experts] with sum one; a domain without load is even."""
    total = load.sum(-1, keepdims=True)
    return np.where(total > 0, load / np.where(total > 0, total, 1), 1 / load.shape[-1])


def _held(placement: np.ndarray, experts: int) -> np.ndarray:
    """How many copies of each expert each rank holds, int64 [layers, experts, ranks]."""
    layers, ranks, _ = placement.shape
    held = np.zeros((layers, experts, ranks), dtype=np.int64)
    np.add.at(held, (np.arange(layers)[:, None, None], placement, np.arange(ranks)[:, None]), 1)
    return held


def _check_sizes(experts: int, ranks: int, slots: int, nodes: int, groups: int) -> None:
    if nodes > 1 and (ranks % nodes or groups % nodes or experts % groups):
        raise LiaoyuanError(
            f"{nodes} nodes must divide the {ranks} ranks and the {groups} groups, and these the {experts} experts."
        )
    if ranks * slots < experts:
        raise LiaoyuanError(f"{experts} experts need {experts} slots, but {ranks} ranks of {slots} slots have fewer.")
    if slots > experts // nodes:
        raise LiaoyuanError(f"{slots} slots a rank are more than the {experts // nodes} experts that it could hold.")


def _node_members(load: np.ndarray, nodes: int, groups: int) -> list[np.ndarray]:
    """The experts of each node: equal numbers of groups, the busiest group first to the node with the least work."""
    groups = max(groups, nodes) if nodes > 1 else 1
    members = np.split(np.arange(len(load)), groups)
    work, chosen = np.zeros(nodes), [[] for _ in range(nodes)]  # type: tuple[np.ndarray, list[list[np.ndarray]]]
    for group in sorted(members, key=lambda group: -load[group].sum()):
        node = min((n for n in range(nodes) if len(chosen[n]) < groups // nodes), key=lambda n: work[n])
        chosen[node].append(group)
        work[node] += load[group].sum()
    return [np.concatenate(groups) for groups in chosen]


def _fill(members: np.ndarray, load: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Place experts with `load` on a node's ranks: the k-th copy goes to who has the most load a copy, then the
    busiest copies first to the rank with the least work that has a slot and no copy of it.
    """
    copies = np.ones(len(members), dtype=np.int64)
    for _ in range(ranks * slots - len(members)):
        copies[np.where(copies < ranks, load / copies, -1.0).argmax()] += 1
    work, filled = np.zeros(ranks), [[] for _ in range(ranks)]  # type: tuple[np.ndarray, list[list[int]]]
    for expert in np.argsort(-load / copies, kind="stable"):
        for _ in range(copies[expert]):
            free = [r for r in range(ranks) if len(filled[r]) < slots and expert not in filled[r]]
            rank = min(free, key=lambda r: work[r]) if free else _make_room(filled, int(expert), slots)
            filled[rank].append(int(expert))
            work[rank] += load[expert] / copies[expert]
    return members[np.array(filled)]


def _make_room(filled: list[list[int]], expert: int, slots: int) -> int:
    """Who has a free slot has the expert already: a rank without it hands on one of its own, and is returned."""
    full = next(r for r, held in enumerate(filled) if expert not in held)
    free = next(r for r, held in enumerate(filled) if len(held) < slots)
    handed = next(other for other in filled[full] if other not in filled[free])
    filled[full].remove(handed)
    filled[free].append(handed)
    return full


def _worthwhile(path: Iterator[Step], price: float, busiest: float) -> Iterator[list[Step]]:
    """The part of a path from imbalance `busiest` after which imbalance + price * moves is least, last of all; nothing
    while it is looked for.

    The path is not followed further than where even one more move to perfect evenness would not pay.
    """
    steps: list[Step] = []
    moves, best, kept = 0, busiest - SMALLEST_GAIN, 0
    for step in path:
        steps.append(step)
        busiest -= step.gain
        moves += len(step.moves)
        if busiest + price * moves < best:
            best, kept = busiest + price * moves, len(steps)
        if 1 + price * (moves + 1) >= best:
            break
        yield []
    yield steps[:kept]


def _path(index: int, layer: np.ndarray, load: np.ndarray, nodes: int) -> Iterator[Step]:
    """Yield the steps of one layer [ranks, slots] down to where none improves it; load [domains, experts] of sum one.

    The maximum falls only if the busiest rank's work does. All that lowers it in one step is tried: another expert in
    one of its slots, a further copy of one of its experts elsewhere, an exchange with another rank.
    """
    layer = layer.copy()
    while True:
        state = _State.of(layer, load, nodes)
        worst = state.work.max()
        best: tuple[float, tuple[Move, ...], np.ndarray] | None = None
        for moves, work in (state.replacements(), state.further_copies(), state.exchanges()):
            if not len(work):
                continue
            rate = _potential(state.work, worst) - _potential(work, worst)
            rate = np.where(work.max((1, 2)) <= worst * (1 + 1e-12), rate, -1.0) / moves.shape[1]
            at = int(rate.argmax())
            if rate[at] > SMALLEST_GAIN and (best is None or rate[at] > best[0]):
                best = (float(rate[at]), tuple(Move(*row) for row in moves[at].tolist()), work[at])
        if best is None:
            return
        for move in best[1]:
            layer[move.rank, move.slot] = move.expert
        yield Step(index, best[1], float(worst - best[2].max()))


def _potential(work: np.ndarray, worst: float) -> np.ndarray:
    """The sum of twelfth powers of the ranks' work [..., domains, ranks], relative to the busiest: near the maximum,
    but it also sees the second-busiest rank.
    """
    power = np.minimum(work, worst) / worst
    power *= power * power  # numpy's own power is many times as slow as these three
    power *= power
    power *= power
    return power.sum((-1, -2))


@dataclass(frozen=True)
class _State:
    """One layer, and what its steps would make of it: each kind as moves int64 [C, 1 or 2, 3] (rank, slot, expert)
    and the ranks' work after each, fp64 [C, domains, ranks].

    work: [domains, ranks], multiples of the mean; held: int64 [experts, ranks]; busiest: the rank with the most work;
    near: bool [ranks], the other ranks of its node; load: [domains, experts], a mean rank's work being one.
    """

    layer: np.ndarray
    load: np.ndarray
    held: np.ndarray
    copies: np.ndarray
    work: np.ndarray
    busiest: int
    near: np.ndarray

    @staticmethod
    def of(layer: np.ndarray, load: np.ndarray, nodes: int) -> "_State":
        ranks = len(layer)
        held = _held(layer[None], load.shape[1])[0]
        load = load * ranks
        work = (load / held.sum(1)) @ held
        busiest = int(work.max(0).argmax())
        near = (np.arange(ranks) * nodes // ranks == busiest * nodes // ranks) & (np.arange(ranks) != busiest)
        return _State(layer, load, held, held.sum(1), work, busiest, near)

    def replacements(self) -> tuple[np.ndarray, np.ndarray]:
        """Another expert in the place of a copy on the busiest rank."""
        here = np.zeros(len(self.layer), dtype=bool)
        here[self.busiest] = True
        wanted = np.flatnonzero(self.held[:, here | self.near].any(1) & (self.held[:, self.busiest] == 0))
        return self._put(np.array([self.busiest]), wanted)

    def further_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """A copy of one of the busiest rank's experts in the place of a copy elsewhere."""
        return self._put(np.flatnonzero(self.near), np.unique(self.layer[self.busiest]))

    def exchanges(self) -> tuple[np.ndarray, np.ndarray]:
        """An expert of the busiest rank against one of another rank."""
        slots = self.layer.shape[1]
        mine, rank, theirs = (x.ravel() for x in np.meshgrid(range(slots), np.flatnonzero(self.near), range(slots)))
        given, taken = self.layer[self.busiest][mine], self.layer[rank, theirs]
        legal = (self.held[given, rank] == 0) & (self.held[taken, self.busiest] == 0)
        mine, rank, theirs, given, taken = (x[legal] for x in (mine, rank, theirs, given, taken))
        change = (self.load / self.copies)[:, given] - (self.load / self.copies)[:, taken]
        work = np.repeat(self.work[None], len(rank), 0)
        work[:, :, self.busiest] -= change.T
        work[np.arange(len(rank)), :, rank] += change.T
        first = np.stack([np.full_like(rank, self.busiest), mine, taken], -1)
        return np.stack([first, np.stack([rank, theirs, given], -1)], 1), work

    def _put(self, ranks: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each of `experts` in each slot of `ranks` whose own expert has another copy."""
        rank, slot, expert = (x.ravel() for x in np.meshgrid(ranks, range(self.layer.shape[1]), experts))
        dropped = self.layer[rank, slot]
        legal = (self.copies[dropped] > 1) & (self.held[expert, rank] == 0)
        rank, slot, expert, dropped = (x[legal] for x in (rank, slot, expert, dropped))
        work = self.work + self._share_out(expert, rank, 1) + self._share_out(dropped, rank, -1)
        return np.stack([rank, slot, expert], -1)[:, None], work

    def _share_out(self, expert: np.ndarray, rank: np.ndarray, more: int) -> np.ndarray:
        """How work changes [C, domains, ranks] when `rank` gets a copy of `expert` (more = 1) or loses one (-1)."""
        after = self.held[expert].astype(np.float64)
        after[np.arange(len(rank)), rank] += more
        per_copy = self.load.T[expert]  # [C, domains]
        before = per_copy / self.copies[expert][:, None]
        return (per_copy / (self.copies[expert] + more)[:, None])[:, :, None] * after[:, None] - (
            before[:, :, None] * self.held[expert][:, None]
        )

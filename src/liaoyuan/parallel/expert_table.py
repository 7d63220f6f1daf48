"""Which slot of which rank holds which expert of a layer, as arrays: where rows go, and what must be sent.

A placement is int [ranks, slots], the expert in each slot. A rank that names an expert twice holds it in the first of
these slots; the others are empty, but give it another share of the expert's rows. Slots are numbered through the ranks:
rank * slots + slot.
"""

from dataclasses import dataclass

import numpy as np

from liaoyuan.errors import LiaoyuanError


@dataclass(frozen=True)
class Transfer:
    """The weights of `expert` go from a slot of one rank to a slot of another, or of the same one."""

    expert: int
    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def is_sent(self) -> bool:
        """Whether it goes to another rank."""
        return self.source[0] != self.target[0]


def first_placement(experts: int, ranks: int, slots: int) -> np.ndarray:
    """Return where experts are at the start, int32 [ranks, slots]: each rank has an equal share, in their order.

    Slots beyond that share name the rank's own experts again: they are empty.
    """
    share = experts // ranks
    return (np.arange(ranks)[:, None] * share + np.arange(slots) % share).astype(np.int32)


def check_placement(placement: np.ndarray, experts: int) -> None:
    """Raise LiaoyuanError if an expert of a layer has no slot, or a slot's expert does not exist.

    placement: int [layers, ranks, slots].
    """
    if placement.size and not 0 <= placement.min() <= placement.max() < experts:
        raise LiaoyuanError(f"A placement names experts beyond the {experts} that a layer has.")
    for layer, slots in enumerate(placement):
        missing = set(range(experts)) - set(slots.flatten().tolist())
        if missing:
            raise LiaoyuanError(f"The placement has no copy of expert {min(missing)} in layer {layer}.")


def holders(placement: np.ndarray, experts: int) -> list[list[tuple[int, int]]]:
    """Return the copies of each expert as (rank, slot), at most one of each rank, in the order of ranks."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    for rank, row in enumerate(placement.tolist()):
        for expert in dict.fromkeys(row):
            found[expert].append((rank, row.index(expert)))
    return found


def slot_table(placement: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where equal shares of each expert's rows go: the numbers of slots, int64 [experts, most], and how many of
    them count, int64 [experts].

    What does not count repeats the first one.
    """
    slots = placement.shape[1]
    shares: list[list[int]] = [[] for _ in range(experts)]
    for rank, row in enumerate(placement.tolist()):
        for expert in row:
            shares[expert].append(rank * slots + row.index(expert))
    most = max(map(len, shares))
    table = [[*share, *share[:1] * (most - len(share))] for share in shares]
    return np.array(table, dtype=np.int64), np.array([len(share) for share in shares], dtype=np.int64)


def moves(before: np.ndarray, after: np.ndarray, experts: int) -> list[Transfer]:
    """Return what must be copied within one set of slots: nothing into slots that hold their expert already."""
    kept = {target for copies in holders(before, experts) for target in copies}
    return [
        transfer
        for transfer in copied(before, after, experts)
        if transfer.target not in kept or before[transfer.target] != transfer.expert
    ]


def copied(source: np.ndarray, target: np.ndarray, experts: int) -> list[Transfer]:
    """Return what must be copied from slots placed like `source` into others, placed like `target`.

    What a rank has itself it takes from itself; of the others the one sends that has sent the least so far.
    """
    there, found, sent = holders(source, experts), [], [0] * len(source)
    for expert, copies in enumerate(holders(target, experts)):
        for rank, slot in copies:
            own = [place for place in there[expert] if place[0] == rank]
            place = own[0] if own else min(there[expert], key=lambda place: (sent[place[0]], place[0]))
            sent[place[0]] += not own
            found.append(Transfer(expert, place, (rank, slot)))
    return found


def count_sent(before: np.ndarray, after: np.ndarray, experts: int) -> int:
    """Return how many experts go to another rank on the way between two placements [layers, ranks, slots]."""
    return sum(move.is_sent for pair in zip(before, after, strict=True) for move in moves(*pair, experts))

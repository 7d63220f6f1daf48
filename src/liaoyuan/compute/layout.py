"""How many processes run, and on which hosts: as many as are offered and the work can be divided by."""

from collections.abc import Callable, Iterable, Sequence

from liaoyuan.errors import LiaoyuanError

Legal = Callable[[int], bool]  # whether the work can be divided over so many processes


def any_number(processes: int) -> bool:
    """Allow every number of processes."""
    return processes > 0


def choose(slots: Sequence[int], smallest: int, legal: Legal = any_number) -> list[int]:
    """Return how many processes each host runs: the largest legal total, hosts filled in order (some may get none).

    Args:
        slots: how many processes each host offers.
        smallest: the fewest processes in all that are wanted.

    Raises:
        LiaoyuanError: no legal number lies between `smallest` and what is offered; the nearest ones are named.
    """
    offered = sum(slots)
    total = next((count for count in range(offered, smallest - 1, -1) if legal(count)), None)
    if total is None:
        raise LiaoyuanError(refusal(offered, smallest, legal))
    shares = []
    for size in slots:
        shares.append(min(size, total))
        total -= shares[-1]
    return shares


def refusal(offered: int, smallest: int, legal: Legal) -> str:
    """Return the sentence that says why `smallest` to `offered` processes cannot run, and what can."""
    below = next((count for count in range(smallest - 1, 0, -1) if legal(count)), None)
    above = next((count for count in range(offered + 1, 8 * offered + 8) if legal(count)), None)
    wanted = f"{offered}" if smallest >= offered else f"{smallest} to {offered}"
    near = _either([count for count in (below, above) if count])
    return f"The work cannot be divided over {wanted} processes; {near or 'no other number'} would do (--nproc)."


def _either(words: Iterable[int]) -> str:
    return " or ".join(map(str, words))

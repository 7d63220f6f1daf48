"""Who waits, and who is next: the lowest priority number first, and fair shares among the keys of one priority.

A key's share is what was computed for it so far, in tokens; the key with the least goes first (virtual token counter:
Sheng et al. 2024, arXiv 2401.00588, sec. 4.1). A key that comes back from idleness starts level with the one that has
had the least, so nobody saves up for later.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.inference.sequence import Sequence


@dataclass
class _Account:
    """A key with sequences in the engine: its place in the table of services, and who of it waits, by priority."""

    place: int
    open: int = 0
    queues: dict[int, deque[Sequence]] = field(default_factory=dict)


class Waiting:
    """The queue in front of the engine."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._service = np.zeros(8)
        self._free_places = list(range(7, -1, -1))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, sequence: Sequence) -> None:
        """Take in a new sequence."""
        account = self._accounts.get(sequence.request.key)
        if account is None:
            account = self._open_account(sequence.request.key)
        account.open += 1
        sequence.account = account.place
        self._queue(sequence).append(sequence)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Take back a sequence that had been started, ahead of those that came later."""
        queue = self._queue(sequence)
        queue.insert(sum(other.arrival < sequence.arrival for other in queue), sequence)
        self._count += 1

    def first(self) -> Sequence | None:
        """Return who is next."""
        best: tuple[int, float, int] | None = None
        chosen = None
        for account in self._accounts.values():
            for priority, queue in account.queues.items():
                rank = (priority, float(self._service[account.place]), queue[0].arrival)
                if best is None or rank < best:
                    best, chosen = rank, queue[0]
        return chosen

    def take(self, sequence: Sequence) -> None:
        """Take a sequence out, to start it or because it is gone."""
        queues = self._accounts[sequence.request.key].queues
        queue = queues[sequence.request.priority]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        if not queue:
            del queues[sequence.request.priority]
        self._count -= 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence that does not wait has ended."""
        account = self._accounts[sequence.request.key]
        account.open -= 1
        if not account.open:
            self._free_places.append(account.place)
            del self._accounts[sequence.request.key]

    def charge(self, accounts: np.ndarray, tokens: np.ndarray) -> None:
        """Add computed tokens to the services of accounts, both [S]."""
        np.add.at(self._service, accounts, tokens)

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self._accounts[sequence.request.key].queues.setdefault(sequence.request.priority, deque())

    def _open_account(self, key: str) -> _Account:
        if not self._free_places:
            size = len(self._service)
            self._service = np.concatenate([self._service, np.zeros(size)])
            self._free_places = list(range(2 * size - 1, size - 1, -1))
        account = _Account(self._free_places.pop())
        least = min((float(self._service[other.place]) for other in self._accounts.values()), default=0.0)
        self._service[account.place] = least
        self._accounts[key] = account
        return account

"""Who may count on blocks of the cache that another process is to read, and for how long.

A lease holds blocks for a reader that tells how many of them it has got (in order, so a number is enough). What it has
is let go. It also lets go of everything when the reader is gone, when it was silent for longer than `duration`, and
when the content of the blocks is no longer what was promised; whatever comes for the lease afterwards is refused.
There are no clocks in here: who calls says what time it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.errors import LiaoyuanError


class LeaseEnded(LiaoyuanError):  # noqa: N818  (a state, not a fault)
    """The lease is over: its blocks may hold something else by now."""


@dataclass
class _Lease:
    blocks: np.ndarray  # what is still held
    got: int  # the place of the first of them: the reader has those before
    ends: float


@dataclass
class Leases:
    """All leases of one engine's blocks. give: lets go of (different) blocks, int32 [C]."""

    duration: float
    give: Callable[[np.ndarray], None]
    _open: dict[str, _Lease] = field(default_factory=dict)

    def grant(self, name: str, first: int, now: float) -> None:
        """Begin a lease of the blocks from the place `first` on; it holds none yet.

        Raises:
            LiaoyuanError: there is one of this name.
        """
        if name in self._open:
            raise LiaoyuanError(f"There is already a lease '{name}'.")
        self._open[name] = _Lease(np.empty(0, dtype=np.int32), first, now + self.duration)

    def add(self, name: str, blocks: np.ndarray) -> None:
        """Take over the next blocks from the caller, who holds them. The lease ends when it would have.

        Raises:
            LeaseEnded: the caller still holds them then.
        """
        lease = self._find(name)
        lease.blocks = np.concatenate([lease.blocks, blocks])

    def acknowledge(self, name: str, got: int | None, now: float) -> None:
        """The reader lives, so its time begins anew; and it has the blocks before the place `got` (None: no news).

        Raises:
            LeaseEnded: it is too late. LiaoyuanError: it cannot have so many, or once had more.
        """
        lease = self._find(name)
        if got is not None:
            count = got - lease.got
            if not 0 <= count <= len(lease.blocks):
                held = f"{lease.got} to {lease.got + len(lease.blocks)}"
                raise LiaoyuanError(f"'{name}' acknowledged {got} blocks, but it can have {held}.")
            self.give(lease.blocks[:count])
            lease.blocks, lease.got = lease.blocks[count:], got
        lease.ends = now + self.duration

    def end(self, name: str) -> bool:
        """Let go of everything; return whether the lease was open."""
        lease = self._open.pop(name, None)
        if lease is None:
            return False
        self.give(lease.blocks)
        return True

    def expire(self, now: float) -> list[str]:
        """End the leases whose time is over, and return their names."""
        over = [name for name, lease in self._open.items() if lease.ends <= now]
        for name in over:
            self.end(name)
        return over

    def held(self) -> np.ndarray:
        """Return all blocks that leases hold, int32, with repetitions where several hold one."""
        parts = [lease.blocks for lease in self._open.values()]
        return np.concatenate([*parts, np.empty(0, dtype=np.int32)])

    def __len__(self) -> int:
        return len(self._open)

    def _find(self, name: str) -> _Lease:
        lease = self._open.get(name)
        if lease is None:
            raise LeaseEnded(f"The lease '{name}' is over.")
        return lease

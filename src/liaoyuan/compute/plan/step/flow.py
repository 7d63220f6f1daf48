"""Microbatches flowing through a pipeline: when each process takes each of its actions, and how long it waits.

An action begins when its process is done with the one before and what it needs has come: a forward pass the stage
before's, a backward pass the stage after's gradient and its own forward pass. Bubbles follow from that.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from liaoyuan.compute.plan.program.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from liaoyuan.errors import LiaoyuanError


@dataclass
class Flow:
    """What came of it: of each process the begin and the end of its actions, in order, and seconds in which it waits.

    bubble: for other stages to compute. travel: for what is on its way, beyond that.
    """

    begins: list[list[float]] = field(default_factory=list)
    ends: list[list[float]] = field(default_factory=list)
    bubble: list[float] = field(default_factory=list)
    travel: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last process is done."""
        return max(times[-1] for times in self.ends)


def flow(
    orders: Sequence[Sequence[Action]],
    seconds: Callable[[Action, bool], float],
    travel: Callable[[int, int], float],
    stages: int,
    cores: float = float("inf"),
    starts: Sequence[float] = (),
) -> Flow:
    """Return how the actions of all processes, each in its order, go on.

    Args:
        seconds: of an action; True if it is the first of its kind in its stage.
        travel: seconds from the process of a number to another, of what stages hand on.
        stages: of the whole pipeline.
        cores: how many processes can compute at the same time; more share them.
        starts: when each process may begin, if not at once.

    Raises:
        LiaoyuanError: the orders wait for each other.
    """
    return _Flow(orders, seconds, travel, stages, cores, starts).run()


class _Flow:
    def __init__(
        self,
        orders: Sequence[Sequence[Action]],
        seconds: Callable[[Action, bool], float],
        travel: Callable[[int, int], float],
        stages: int,
        cores: float,
        starts: Sequence[float],
    ) -> None:
        self.orders, self.seconds, self.travel, self.stages, self.cores = orders, seconds, travel, stages, cores
        self.owner = {action.stage: rank for rank, order in enumerate(orders) for action in order}
        self.done: dict[Action, float] = {}
        self.seen: set[tuple[str, int]] = set()
        count = len(orders)
        self.rest = [deque(order) for order in orders]
        self.free = list(starts) or [0.0] * count
        self.found = Flow([[] for _ in orders], [[] for _ in orders], [0.0] * count, [0.0] * count)

    def run(self) -> Flow:
        running: dict[int, tuple[Action, float]] = {}  # process -> what it computes, and what is left of it
        now = 0.0
        while running or any(self.rest):
            following = float("inf")
            for rank, rest in enumerate(self.rest):
                if rank in running or not rest:
                    continue
                ready = self._ready(rank, rest[0])
                if ready is not None and ready <= now:
                    running[rank] = self._begin(rank, now)
                elif ready is not None:
                    following = min(following, ready)
            speed = min(1.0, self.cores / len(running)) if running else 1.0
            if running:
                following = min(following, now + min(left for _, left in running.values()) / speed)
            if following == float("inf"):
                raise LiaoyuanError("The schedule's processes wait for each other: no action can begin.")
            for rank, (action, left) in list(running.items()):
                left -= (following - now) * speed
                running[rank] = action, left
                if left <= 1e-12 * (1.0 + following):
                    del running[rank]
                    self.done[action] = self.free[rank] = following
                    self.found.ends[rank].append(following)
            now = following
        return self.found

    def _ready(self, rank: int, action: Action) -> float | None:
        """Return when an action may begin, None if that is not known yet."""
        ready = self.free[rank]
        for needed in self._needs(action):
            if needed not in self.done:
                return None
            ready = max(ready, self.done[needed] + self._way(needed, rank))
        return ready

    def _begin(self, rank: int, now: float) -> tuple[Action, float]:
        action = self.rest[rank].popleft()
        waited = now - self.free[rank]
        if waited > 0:
            computed = max((self.done[needed] for needed in self._needs(action)), default=0.0)
            bubble = min(waited, max(0.0, computed - self.free[rank]))
            self.found.bubble[rank] += bubble
            self.found.travel[rank] += waited - bubble
        self.found.begins[rank].append(now)
        key = action.kind, action.stage
        is_first = key not in self.seen
        self.seen.add(key)
        return action, self.seconds(action, is_first)

    def _needs(self, action: Action) -> list[Action]:
        kind, stage, number = action
        if kind == FORWARD:
            return [Action(FORWARD, stage - 1, number)] if stage else []
        if kind == WEIGHT:
            return [Action(INPUT, stage, number)]
        own = Action(FORWARD, stage, number)
        if stage == self.stages - 1:
            return [own]
        following = (Action(kind, stage + 1, number) for kind in (BACKWARD, INPUT))
        return [own, next((action for action in following if action in self.done), Action(INPUT, stage + 1, number))]

    def _way(self, needed: Action, rank: int) -> float:
        sender = self.owner[needed.stage]
        return self.travel(sender, rank) if sender != rank else 0.0

# mypy: disable-error-code="override"
"""Ranks of a layout simulated in one process: threads that take turns and exchange tensors through memory.

One rank runs at a time, until it waits for another; then the next that can go on does. So a run is the same every
time, costs one Python and no sockets, may be stepped through with a debugger, and its worlds may be larger than a
machine could hold as processes. When nobody can go on, or ranks of a group call different collectives, every rank
stops and the error says who waits for whom: what a job on cards shows as a hang of ten minutes.

The semantics are those of the strictest backend: a collective reads and writes nothing before all of its group have
called it, and a send ends when it is received.

    outcomes = simulate(8, job, layout)    # job(world, layout) in each of 8 ranks
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import ReduceOp, Work, distributed_c10d

from liaoyuan.device import Device
from liaoyuan.parallel.world import World

BACKEND = "simulated"
REDUCTIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.PRODUCT: torch.mul,
}
# What torch keeps of process groups, by name in `torch.distributed.distributed_c10d._world`.
TABLES = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "tags_to_pg", "pg_to_tag", "pg_coalesce_state")


class StuckError(RuntimeError):
    """No rank can go on, or those of a group do not agree on what to exchange."""


def simulate(size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `job(world, *arguments)` gives in each of `size` simulated ranks, in the order of ranks.

    Raises what the first failing rank raised, with its number in a note, and StuckError if all of them wait. The
    ranks share whatever is global in Python: a job must not rely on `torch.manual_seed` or change modules. On the CPU.
    """
    _register()
    turns = _Turns(size)
    answers: list[Any] = [None] * size
    cores = torch.get_num_threads()

    def live(rank: int) -> None:
        torch.set_num_threads(cores)  # a setting of each thread
        with _own_groups():
            dist.init_process_group(BACKEND, rank=rank, world_size=size, store=HashStore())
            try:
                answers[rank] = job(World(rank, size, Device("cpu")), *arguments)
            finally:
                dist.destroy_process_group()

    with _torch_shared(turns):
        threads = [threading.Thread(target=turns.take, args=(rank, live), name=f"rank {rank}") for rank in range(size)]
        for thread in threads:
            thread.start()
        turns.begin()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as error:  # the ranks end when they next change turns
            turns.failure = error
            for thread in threads:
                thread.join()
    if turns.failure is not None:
        raise turns.failure
    return answers


class _Turns:
    """Whose turn it is. Only one rank's thread runs at any time, so nothing here or in the groups needs a lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.failure: BaseException | None = None
        self.meetings: dict[tuple[str, int], _Meeting] = {}
        self.letters: dict[tuple[Any, ...], list[_Letter]] = {}
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._waits: dict[int, _Exchange] = {}
        self._left = set(range(size))

    def begin(self) -> None:
        self._turn[0].release()

    def take(self, rank: int, live: Callable[[int], None]) -> None:
        """The life of a rank: from its first turn until it ends, if no other has failed before."""
        self._turn[rank].acquire()
        try:
            if self.failure is None:
                live(rank)
        except BaseException as error:  # whatever it is: the others must not wait for ever
            if self.failure is None:
                error.add_note(f"in simulated rank {rank} of {self.size}")
                self.failure = error
        finally:
            self._left.discard(rank)
            self._pass_on(rank)

    def wait(self, rank: int, exchange: "_Exchange") -> None:
        """Let others run until an exchange of this rank is done; raises StuckError when it never will be."""
        while not exchange.done:
            self._waits[rank] = exchange
            self._pass_on(rank)
            self._turn[rank].acquire()
            self._waits.pop(rank, None)
            if self.failure is not None:
                raise StuckError("another rank failed")

    def _pass_on(self, rank: int) -> None:
        order = [(rank + step) % self.size for step in range(1, self.size + 1)]
        order = [other for other in order if other in self._left]
        ready = [other for other in order if other not in self._waits or self._waits[other].done]
        if order and not ready and self.failure is None:
            told = [f"rank {other} waits in {self._waits[other].text}" for other in sorted(order)]
            ended = [str(other) for other in range(self.size) if other not in self._left]
            told += [f"ranks that have ended: {', '.join(ended)}"] if ended else []
            self.failure = StuckError("no rank can go on:\n" + "\n".join(told))
        if ready or order:
            self._turn[(ready or order)[0]].release()


class _Exchange(Work):
    """Something under way that a rank can wait for."""

    def __init__(self, turns: _Turns, rank: int, text: str) -> None:
        super().__init__()
        self._turns, self._rank, self.text, self.done = turns, rank, text, False

    def wait(self, timeout: Any = None) -> bool:
        self._turns.wait(self._rank, self)
        return True

    def is_completed(self) -> bool:
        return self.done

    def is_success(self) -> bool:
        return self.done

    def get_future(self) -> Any:
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(None)
        return future


@dataclass
class _Meeting:
    """A collective whose ranks arrive one by one."""

    kind: str
    shapes: Any
    parts: dict[int, Any] = field(default_factory=dict)
    exchanges: list[_Exchange] = field(default_factory=list)


@dataclass
class _Letter:
    """A tensor that is sent, or the place for one that is awaited."""

    tensor: Tensor
    is_sent: bool
    exchange: _Exchange


class SimulatedGroup(dist.ProcessGroup):
    """What torch calls for one rank of a group; `ranks` are the numbers of its members in the world."""

    def __init__(self, turns: _Turns, name: str, ranks: Sequence[int], rank: int) -> None:
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]
        self._turns, self._name, self._ranks, self._rank = turns, name, list(ranks), rank
        self._calls = 0
        self._alive: list[_Exchange] = []  # torch's C++ side holds no reference to them

    # -- what torch asks ------------------------------------------------------------------------------------------
    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    @property
    def group_name(self) -> str:
        return str(distributed_c10d._world.pg_names[self])

    # -- collectives ----------------------------------------------------------------------------------------------
    def barrier(self, opts: Any = None) -> Work:
        return self._meet("barrier", (), None, lambda parts: None)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        reduce = _reduction(opts)

        def move(parts: list[list[Tensor]]) -> None:
            for same in zip(*parts, strict=True):
                total = reduce(same)
                for tensor in same:
                    _write(tensor, total)

        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        return self._meet("all_reduce", [x.shape for x in tensors], tensors, move)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        root = opts.rootRank

        def move(parts: list[list[Tensor]]) -> None:
            for same in zip(*parts, strict=True):
                for tensor in same:
                    if tensor is not same[root]:
                        _write(tensor, same[root])

        return self._meet("broadcast", (root, [x.shape for x in tensors]), tensors, move)

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Work:
        def move(parts: list[tuple[Tensor, Tensor]]) -> None:
            whole = torch.cat([own.reshape(-1) for _, own in parts])
            for into, _ in parts:
                _write(into, whole.view(into.shape))

        return self._meet("all_gather", x.shape, (out, x), move)

    def all_gather_single_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any = None) -> Work:
        works = [self.all_gather_single(out, x) for out, x in zip(outs, xs, strict=True)]
        return works[-1]  # its group meets in the same order, so the others are done too

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor], opts: Any = None) -> Work:
        def move(parts: list[tuple[list[Tensor], Tensor]]) -> None:
            for into, _ in parts:
                for place, (_, own) in zip(into, parts, strict=True):
                    _write(place, own)

        return self._meet("all_gather", None, (outs[0], xs[0]), move)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Work:
        reduce = _reduction(opts)

        def move(parts: list[tuple[Tensor, Tensor]]) -> None:
            chunks = [own.reshape(self.size(), -1) for _, own in parts]
            for place, (into, _) in enumerate(parts):
                _write(into, reduce([chunk[place] for chunk in chunks]).view(into.shape))

        return self._meet("reduce_scatter", x.shape, (out, x), move)

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any = None) -> Work:
        works = [self.reduce_scatter_single(out, x, opts) for out, x in zip(outs, xs, strict=True)]
        return works[-1]

    def all_to_all_single(
        self, out: Tensor, x: Tensor, received: Sequence[int] | None, sent: Sequence[int] | None, opts: Any = None
    ) -> Work:
        size = self.size()
        received = list(received) if received else [out.shape[0] // size] * size
        sent = list(sent) if sent else [x.shape[0] // size] * size

        def move(parts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> None:
            for place, (into, _) in enumerate(parts):
                for sender, piece in enumerate(into):
                    _write(piece, parts[sender][1][place])

        return self._meet("all_to_all", x.shape[1:], (out.split(received), x.split(sent)), move)

    def gather(self, outs: list[list[Tensor]], xs: list[Tensor], opts: Any) -> Work:
        def move(parts: list[tuple[list[Tensor], Tensor]]) -> None:
            for place, (_, own) in zip(parts[opts.rootRank][0], parts, strict=True):
                _write(place, own)

        return self._meet("gather", (opts.rootRank, xs[0].shape), (outs[0] if outs else [], xs[0]), move)

    def scatter(self, outs: list[Tensor], xs: list[list[Tensor]], opts: Any) -> Work:
        def move(parts: list[tuple[Tensor, list[Tensor]]]) -> None:
            for (into, _), own in zip(parts, parts[opts.rootRank][1], strict=True):
                _write(into, own)

        return self._meet("scatter", (opts.rootRank, outs[0].shape), (outs[0], xs[0] if xs else []), move)

    def _meet(self, kind: str, shapes: Any, part: Any, move: Callable[[list[Any]], None]) -> Work:
        key = (self._name, self._calls)
        self._calls += 1
        meeting = self._turns.meetings.setdefault(key, _Meeting(kind, shapes))
        if (meeting.kind, meeting.shapes) != (kind, shapes):
            first = self._ranks[next(iter(meeting.parts))]
            raise StuckError(
                f"rank {self._ranks[self._rank]} calls {_told(kind, shapes)} where rank {first} calls "
                f"{_told(meeting.kind, meeting.shapes)}, exchange {key[1]} of ranks {self._ranks}"
            )
        meeting.parts[self._rank] = part
        exchange = self._begin(f"{_told(kind, shapes)} of ranks {self._ranks}")
        meeting.exchanges.append(exchange)
        if len(meeting.parts) == self.size():
            move([meeting.parts[rank] for rank in range(self.size())])
            for one in meeting.exchanges:
                one.done = True
            del self._turns.meetings[key]
        return exchange

    # -- from one to one ------------------------------------------------------------------------------------------
    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Work:
        return self._post(self._rank, to, tag, tensors[0], is_sent=True)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Work:
        return self._post(source, self._rank, tag, tensors[0], is_sent=False)

    def _post(self, source: int, to: int, tag: int, tensor: Tensor, is_sent: bool) -> Work:
        box = self._turns.letters.setdefault((self._name, source, to, tag), [])
        text = f"{'send to' if is_sent else 'receive from'} rank {self._ranks[to if is_sent else source]}"
        exchange = self._begin(f"{text}, {_told('', tensor.shape)}")
        mine = _Letter(tensor, is_sent, exchange)
        if not box or box[0].is_sent == is_sent:
            box.append(mine)
            return exchange
        other = box.pop(0)
        if other.tensor.numel() != tensor.numel():
            raise StuckError(f"{exchange.text}: the other side has {_told('', other.tensor.shape)}")
        letter, place = (mine, other) if is_sent else (other, mine)
        _write(place.tensor, letter.tensor.reshape(place.tensor.shape))
        mine.exchange.done = other.exchange.done = True
        return exchange

    def _begin(self, text: str) -> _Exchange:
        exchange = _Exchange(self._turns, self._ranks[self._rank], text)
        self._alive = [one for one in self._alive if not one.done] + [exchange]
        return exchange


def _told(kind: str, shapes: Any) -> str:
    if isinstance(shapes, torch.Size):
        shapes = list(shapes)
    elif isinstance(shapes, list):
        shapes = [list(shape) for shape in shapes]
    return f"{kind} of {shapes}".strip() if shapes not in ((), None) else kind


def _write(place: Tensor, tensor: Tensor) -> None:
    """Copy behind autograd's back, as a network card does: what it saved may be filled after it saw the tensor."""
    place.data.copy_(tensor.data)


def _reduction(opts: Any) -> Callable[[Sequence[Tensor]], Tensor]:
    operation = next((op for op in REDUCTIONS if opts is None or opts.reduceOp == op), None)
    if operation is None:
        raise NotImplementedError(f"reduction {opts.reduceOp} between simulated ranks")

    def reduce(tensors: Sequence[Tensor]) -> Tensor:
        total = tensors[0].data.clone()
        for tensor in tensors[1:]:
            total = REDUCTIONS[operation](total, tensor.data)
        return total / len(tensors) if operation == ReduceOp.AVG else total

    return reduce


# -- torch's global tables, one for each rank -----------------------------------------------------------------------
class _Tables:
    """Stands in for torch's table of process groups: each rank's thread sees its own, any other thread torch's."""

    def __init__(self, whole: Any) -> None:
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_own", threading.local())

    def _table(self) -> Any:
        return getattr(self._own, "table", self._whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._table(), name, value)


_turns_now: list[_Turns] = []  # of the simulation that runs


def _register() -> None:
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _make_group, extended_api=True, devices=["cpu"])


def _make_group(options: Any, _: Any) -> SimulatedGroup:
    ranks = options.global_ranks_in_group or range(options.group_size)
    name = f"{options.group_id} {list(ranks)}"
    return SimulatedGroup(_turns_now[-1], name, ranks, options.group_rank)


@contextmanager
def _torch_shared(turns: _Turns) -> Iterator[None]:
    """Give each thread its own table of process groups while a simulation runs."""
    c10d: Any = distributed_c10d
    whole = c10d._world
    c10d._world = _Tables(whole)
    isolate: Any = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    isolate(True)
    _turns_now.append(turns)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _turns_now.pop()
        isolate(False)
        c10d._world = whole


@contextmanager
def _own_groups() -> Iterator[None]:
    own = distributed_c10d._world._own  # type: ignore[attr-defined]
    own.table = SimpleNamespace(**{name: {} for name in TABLES}, default_pg=None, group_count=0, comms=[])
    with torch.autograd.set_multithreading_enabled(False):
        try:
            yield
        finally:
            del own.table

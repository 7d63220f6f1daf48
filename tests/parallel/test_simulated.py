"""Simulated ranks exchange what processes would, take turns alike every time, and say who waits for whom."""

import threading

import pytest
import torch
import torch.distributed as dist

from liaoyuan.parallel import World
from liaoyuan.parallel.simulated import StuckError, simulate
from tests.parallel.processes import run


def every_exchange(world: World) -> dict[str, torch.Tensor]:
    """Exchange numbers that depend on the rank by each way that torch knows of; uneven where it may be."""
    rank, size = world.rank, world.size
    x = torch.arange(6.0) + 10 * rank
    found = {}
    for name in ("SUM", "MAX", "MIN", "PRODUCT"):
        found[name] = x.clone()
        dist.all_reduce(found[name], getattr(dist.ReduceOp, name))
    found["gathered"] = torch.zeros(6 * size)
    dist.all_gather_single(found["gathered"], x)
    lists = [torch.zeros(6) for _ in range(size)]
    dist.all_gather(lists, x)
    found["listed"] = torch.stack(lists)
    found["scattered sum"] = torch.zeros(2)
    dist.reduce_scatter_single(found["scattered sum"], x)
    sent, received = [(rank + to) % size for to in range(size)], [(rank + source) % size for source in range(size)]
    found["exchanged"] = torch.zeros(sum(received), 2)
    dist.all_to_all_single(found["exchanged"], torch.arange(2.0 * sum(sent)).view(-1, 2) + 100 * rank, received, sent)
    found["broadcast"] = x.clone()
    dist.broadcast(found["broadcast"], 1)
    parts = [torch.zeros(6) for _ in range(size)] if rank == 2 else None
    dist.gather(x, parts, 2)
    found["collected"] = torch.stack(parts) if parts else torch.zeros(0)
    found["dealt"] = torch.zeros(6)
    dist.scatter(found["dealt"], [x + to for to in range(size)] if rank == 0 else None, 0)
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": other} for other in range(size)]
    first, second = torch.zeros(6), torch.zeros(6)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.irecv, first, (rank - 1) % size),
            dist.P2POp(dist.irecv, second, (rank - 1) % size),
            dist.P2POp(dist.isend, x, (rank + 1) % size),
            dist.P2POp(dist.isend, 2 * x, (rank + 1) % size),
        ]
    )
    for work in works:
        work.wait()
    found["first letter"], found["second letter"] = first, second
    half = dist.new_group([0, 2])
    found["of a half"] = x.clone()
    if rank != 1:
        dist.all_reduce(found["of a half"], group=half)
    dist.barrier()
    return found


def test_ranks_exchange_what_processes_do() -> None:
    for simulated, real in zip(simulate(3, every_exchange), run(3, every_exchange), strict=True):
        assert simulated.keys() == real.keys()
        assert all(torch.equal(simulated[name], real[name]) for name in real)


def test_ranks_take_turns_alike_every_time() -> None:
    def turns() -> list[int]:
        seen: list[int] = []

        def job(world: World) -> None:
            for _ in range(3):
                seen.append(world.rank)
                world.barrier()

        simulate(4, job)
        return seen

    assert turns() == turns() and len(turns()) == 12


def test_who_waits_for_whom_is_said() -> None:
    def job(world: World) -> None:
        if world.rank == 0:
            dist.all_reduce(torch.zeros(5))
        elif world.rank == 1:
            dist.recv(torch.zeros(3), 2)

    with pytest.raises(StuckError) as failure:
        simulate(3, job)
    told = str(failure.value)
    assert "rank 0 waits in all_reduce of [[5]] of ranks [0, 1, 2]" in told
    assert "rank 1 waits in receive from rank 2, of [3]" in told and "ranks that have ended: 2" in told


def test_different_calls_in_one_place_are_said() -> None:
    def job(world: World) -> None:
        x = torch.zeros(4)
        dist.all_reduce(x) if world.rank else dist.broadcast(x, 0)

    with pytest.raises(StuckError, match=r"rank 1 calls all_reduce.* where rank 0 calls broadcast.*exchange 0"):
        simulate(2, job)


def test_an_error_in_one_rank_ends_all() -> None:
    def job(world: World) -> None:
        if world.rank == 2:
            raise ValueError("on purpose")
        world.barrier()

    before = threading.active_count()
    with pytest.raises(ValueError, match="on purpose") as failure:
        simulate(4, job)
    assert failure.value.__notes__ == ["in simulated rank 2 of 4"]
    assert threading.active_count() == before and not dist.is_initialized()

"""What the links between processes really give: collectives of six sizes, timed by the processes that would train.

They are started as this project starts processes that train together (`parallel.start`), over the device's own back
end. Every collective counts as the slowest process saw it; of the rounds the fastest.
"""

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from liaoyuan.compute.network import LOOPBACK, listen
from liaoyuan.compute.plan.cluster import Cluster, Link
from liaoyuan.compute.plan.fabric import Fabric
from liaoyuan.compute.plan.fit import Numbers, fit
from liaoyuan.compute.plan.profile import DeviceProfile, Figure, LinkRate
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World, start
from liaoyuan.rundir import Progress, Report, silent

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send")
SIZES = (4096, 65_536, 524_288, 4_194_304, 16_777_216, 67_108_864)  # bytes of the whole that is exchanged
LEAST, ROUNDS = 2e-3, 5  # seconds that a collective is repeated for, and how often
SIDE = 1024  # of the matrices that are multiplied while messages travel
LEAST_SIGMA = 0.05
DEADLINE = 300  # seconds without a word from the processes


@dataclass(frozen=True)
class Travelled:
    """Seconds of a collective in which each process sends so many bytes, as `parallel.traffic` counts them."""

    kind: str
    sent: float
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.sent:,.0f} bytes"


@dataclass(frozen=True)
class Links:
    """What was timed, and how much longer computing takes while messages travel."""

    processes: int
    travelled: tuple[Travelled, ...]
    contention: float


def measure_links(device: Device, processes: int, report: Report = silent) -> Links:
    """Start `processes` processes of this host, let them exchange, and return what they timed.

    Raises:
        LiaoyuanError: one of them failed, or none says a word for minutes.
    """
    context = multiprocessing.get_context("spawn")
    with listen(LOOPBACK) as free:
        port = free.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(processes)]
    threads = max(1, torch.get_num_threads() // processes)
    workers = [
        context.Process(target=_work, args=(theirs, rank, processes, port, device.type, threads), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for worker in workers:
        worker.start()
    for _, theirs in pairs:
        theirs.close()  # so that the end of a process is heard
    try:
        return _heard([ours for ours, _ in pairs], report)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _heard(pipes: Sequence[Connection], report: Report) -> Links:
    while True:
        if not pipes[0].poll(DEADLINE):
            raise LiaoyuanError(f"The processes that time the links have not said a word for {DEADLINE} seconds.")
        try:
            told = pipes[0].recv()
        except EOFError:
            raise LiaoyuanError("A process that times the links has died.") from None
        if isinstance(told, str):
            raise LiaoyuanError(f"A process that times the links failed: {told}")
        if isinstance(told, Links):
            return told
        report(told)


def _work(pipe: Connection, rank: int, size: int, port: int, kind: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(threads)
    world = None
    try:
        device = Device(kind) if kind == "cpu" else Device(kind, rank)
        if not device.is_cpu:
            torch.get_device_module(kind).set_device(rank)
        world = start(device)
        found = timed(world, pipe.send if rank == 0 else silent)
        if rank == 0:
            pipe.send(found)
        world.barrier()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        if world:
            world.close()


def timed(world: World, report: Report = silent) -> Links:
    """Time the collectives; called by every process of the world at once."""
    found = dict[tuple[str, int], float]()
    total = ROUNDS * len(KINDS) * len(SIZES)
    for turn in range(ROUNDS):
        for number, (kind, size) in enumerate((kind, size) for kind in KINDS for size in SIZES):
            took = _slowest(world, _seconds(world, _exchange(world, kind, size)))
            found[kind, size] = min(took, found.get((kind, size), took))
            report(Progress(turn * len(KINDS) * len(SIZES) + number + 1, total, "exchange", kind))
    travelled = tuple(Travelled(kind, _sent(kind, size, world.size), took) for (kind, size), took in found.items())
    return Links(world.size, travelled, _contention(world))


def _exchange(world: World, kind: str, size: int) -> Callable[[], Any]:
    """Return a collective of so many bytes of bf16 in all."""
    part = max(size // 2 // world.size, 1)
    whole, own = (
        torch.zeros(count, dtype=torch.bfloat16, device=world.device.torch) for count in (part * world.size, part)
    )
    other = torch.empty_like(whole)
    if kind == "all-reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all-gather":
        return lambda: dist.all_gather_into_tensor(whole, own)
    if kind == "reduce-scatter":
        return lambda: dist.reduce_scatter_tensor(own, whole)
    if kind == "all-to-all":
        return lambda: dist.all_to_all_single(other, whole)
    following, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def send() -> None:
        works = [dist.P2POp(dist.isend, whole, following), dist.P2POp(dist.irecv, other, before)]
        for work in dist.batch_isend_irecv(works):
            work.wait()

    return send


def _sent(kind: str, size: int, processes: int) -> float:
    """Return the bytes that each process sends, by the algorithm that sends least."""
    if kind == "send":
        return float(size)
    return size * (processes - 1) / processes * (2 if kind == "all-reduce" else 1)


def _seconds(world: World, exchange: Callable[[], Any]) -> float:
    """Return the seconds of one of several exchanges, of which all processes make equally many."""
    exchange()
    once = _slowest(world, _of(world, exchange, 1))
    count = max(1, min(200, int(LEAST / max(once, 1e-7))))
    return _of(world, exchange, count)


def _of(world: World, exchange: Callable[[], Any], count: int) -> float:
    world.device.synchronize()
    world.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        exchange()
    world.device.synchronize()
    return (time.perf_counter() - begin) / count


def _slowest(world: World, took: float) -> float:
    value = torch.tensor([took], dtype=torch.float32, device=world.device.torch)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _contention(world: World) -> float:
    """Return by how much products take longer while an all-reduce is under way."""
    device = world.device
    dtype = device.default_dtype
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device.torch)
    message = torch.zeros(SIZES[-1] // 2, dtype=torch.bfloat16, device=device.torch)
    ratios = list[float]()
    for _ in range(ROUNDS):
        alone = _of(world, lambda: x @ x, 4)
        world.barrier()
        work = dist.all_reduce(message, async_op=True)
        begin, count = time.perf_counter(), 0
        while count == 0 or (not work.is_completed() and count < 64):
            x @ x
            device.synchronize()
            count += 1
        ratios.append((time.perf_counter() - begin) / count / alone)
        work.wait()
    return _slowest(world, max(statistics.median(ratios), 1.0))


def with_links(profile: DeviceProfile, cluster: Cluster, found: Links) -> DeviceProfile:
    """Return the profile with what was measured of the level of the network that joins all of these processes."""
    ranks = tuple(range(found.processes))
    level = next(link for link in cluster.links if not link.reach or link.reach >= found.processes)
    took = np.array([one.seconds for one in found.travelled])

    def told(values: Numbers) -> Numbers:
        fabric = Fabric(cluster, _linked(profile, level, *(Figure(median=float(one)) for one in values)))
        return np.array([fabric.transfer(one.kind, one.sent, ranks).seconds for one in found.travelled])

    begin = profile.links[level.name]
    values, off = fit(told, np.array([begin.share.median, begin.latency.median]), took)
    sigma = max(1.4826 * float(np.median(np.abs(off))), LEAST_SIGMA)
    share, latency = (Figure(median=float(one), sigma=sigma) for one in values)
    residuals = {one.name: float(error) for one, error in zip(found.travelled, off, strict=True)}
    return _linked(profile, level, share, latency).model_copy(
        update={
            "contention": Figure(median=found.contention, sigma=LEAST_SIGMA),
            "residuals": profile.residuals | residuals,
            "rests_on": f"{profile.rests_on}, and {len(residuals)} of messages between {found.processes} processes",
        }
    )


def _linked(profile: DeviceProfile, level: Link, share: Figure, latency: Figure) -> DeviceProfile:
    return profile.model_copy(update={"links": profile.links | {level.name: LinkRate(share=share, latency=latency)}})

"""What the links between processes really give: collectives of six sizes, timed by the processes that would train.

They are started as this project starts processes that train together (`parallel.start`), over the device's own back
end. Every collective counts as the slowest process saw it; of the rounds the fastest.
"""

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from liaoyuan.compute.network import LOOPBACK, listen
from liaoyuan.compute.plan.calibration.fit import Numbers, fit
from liaoyuan.compute.plan.machine.cluster import Cluster, Link
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import Carry, DeviceProfile, Figure, KindRate, LinkRate
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.parallel import World, start
from liaoyuan.rundir import Progress, Report, silent

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send")
SIZES = (4096, 32_768, 262_144, 2_097_152, 8_388_608, 33_554_432)  # bytes of the whole that is exchanged
LEAST, ROUNDS = 2e-3, 4  # seconds that a collective is repeated for, and how often
LONG, LONG_ROUNDS = 0.1, 2  # seconds from which on a collective is timed so often alone: little disturbs it
ENOUGH = 0.25  # seconds of a collective, of which larger ones say nothing new
ASKED = 10  # collectives in a row of which it is timed what asking for them takes
SIDE = 1024  # of the matrices that are multiplied while messages travel
LEAST_SIGMA = 0.05
DEADLINE = 300  # seconds without a word from the processes


@dataclass(frozen=True)
class Travelled:
    """Seconds of a collective in which each process sends so many bytes, as `parallel.traffic` counts them.

    computed: seconds that the process computes meanwhile, with all its threads.
    """

    kind: str
    sent: float
    seconds: float
    computed: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.sent:,.0f} bytes"


@dataclass(frozen=True)
class Links:
    """What was timed, and how much longer computing takes while messages travel.

    asking: seconds that the thread which asks for a small collective computes for it.
    """

    processes: int
    travelled: tuple[Travelled, ...]
    contention: float
    asking: float = 0.0


def measure_links(device: Device, processes: int, report: Report = silent) -> Links:
    """Start `processes` processes of this host, let them exchange, and return what they timed.

    Raises:
        LiaoyuanError: one of them failed, or none says a word for minutes.
    """
    report(Progress(0, processes, "process", "starting"))
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
    found, computed = dict[tuple[str, int], float](), dict[tuple[str, int], float]()
    total = ROUNDS * len(KINDS) * len(SIZES)
    for turn in range(ROUNDS):
        for number, (kind, size) in enumerate((kind, size) for kind in KINDS for size in SIZES):
            if _is_wanted(found, kind, size, turn):
                took, own = (_slowest(world, one) for one in _seconds(world, _exchange(world, kind, size)))
                found[kind, size] = min(took, found.get((kind, size), took))
                computed[kind, size] = min(own, computed.get((kind, size), own))
            report(Progress(turn * len(KINDS) * len(SIZES) + number + 1, total, "exchange", kind))
    travelled = tuple(
        Travelled(kind, _sent(kind, size, world.size), took, computed[kind, size])
        for (kind, size), took in found.items()
    )
    return Links(world.size, travelled, _contention(world), _asking(world) if world.device.is_cpu else 0.0)


def _asking(world: World) -> float:
    """Return the seconds that this thread itself computes for a small collective: the median over their kinds."""
    found = list[float]()
    for kind in KINDS:
        exchange, least = _exchange(world, kind, SIZES[0]), float("inf")
        for _ in range(ROUNDS):
            begin = time.thread_time()
            for _ in range(ASKED):
                exchange()
            least = min(least, (time.thread_time() - begin) / ASKED)
        found.append(least)
    return _slowest(world, statistics.median(found))


def _is_wanted(found: Mapping[tuple[str, int], float], kind: str, size: int, turn: int) -> bool:
    """Return whether a collective is to be timed in this round, by times that all processes know alike."""
    if turn:
        return (kind, size) in found and (turn < LONG_ROUNDS or found[kind, size] < LONG)
    place = SIZES.index(size)
    return place == 0 or found.get((kind, SIZES[place - 1]), ENOUGH) < ENOUGH


def _exchange(world: World, kind: str, size: int) -> Callable[[], Any]:
    """Return a collective of so many bytes in all, in the dtype that this device trains in as a rule: reductions of
    others may take longer.
    """
    dtype = world.device.default_dtype
    part = max(size // dtype.itemsize // world.size, 1)
    whole, own = (torch.zeros(count, dtype=dtype, device=world.device.torch) for count in (part * world.size, part))
    other = torch.empty_like(whole)
    if kind == "all-reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all-gather":
        return lambda: dist.all_gather_single(whole, own)
    if kind == "reduce-scatter":
        return lambda: dist.reduce_scatter_single(own, whole)
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


def _seconds(world: World, exchange: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of one of several exchanges, of which all processes make equally many, and those of them that
    this process computes.
    """
    exchange()
    once, computed = _of(world, exchange, 1)
    count = min(200, int(LEAST / max(_slowest(world, once), 1e-7)))
    return _of(world, exchange, count) if count > 1 else (once, computed)


def _of(world: World, exchange: Callable[[], Any], count: int) -> tuple[float, float]:
    world.device.synchronize()
    world.barrier()
    begin, computed = time.perf_counter(), time.process_time()
    for _ in range(count):
        exchange()
    world.device.synchronize()
    return (time.perf_counter() - begin) / count, (time.process_time() - computed) / count


def _slowest(world: World, took: float) -> float:
    value = torch.tensor([took], dtype=torch.float32, device=world.device.torch)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _contention(world: World) -> float:
    """Return by how much products take longer while an all-reduce is under way."""
    device = world.device
    dtype = device.default_dtype
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device.torch)
    message = torch.zeros(SIZES[-1] // dtype.itemsize, dtype=dtype, device=device.torch)
    ratios = list[float]()
    for _ in range(ROUNDS):
        alone, _ = _of(world, lambda: x @ x, 4)
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
    """Return the profile with what was measured of the level of the network that joins all of these processes: what its
    collectives get of it on the whole, and beside that each kind of them.
    """
    level = next(link for link in cluster.links if not link.reach or link.reach >= found.processes)
    rate, _ = _fitted(profile, cluster, level, found, found.travelled, profile.links[level.name])
    kinds, residuals = dict[str, KindRate](), dict[str, float]()
    for kind in dict.fromkeys(one.kind for one in found.travelled):
        own = [one for one in found.travelled if one.kind == kind]
        faster, off = _fitted(profile, cluster, level, found, own, rate)
        kinds[kind] = KindRate(
            share=faster.share.median / rate.share.median, latency=faster.latency.median / rate.latency.median
        )
        residuals |= {one.name: float(error) for one, error in zip(own, off, strict=True)}
    sigma = max(1.4826 * float(np.median(np.abs(list(residuals.values())))), LEAST_SIGMA)
    share, latency = (Figure(median=figure.median, sigma=sigma) for figure in (rate.share, rate.latency))
    return _linked(profile, level, LinkRate(share=share, latency=latency, kinds=kinds)).model_copy(
        update={
            "contention": Figure(median=found.contention, sigma=LEAST_SIGMA),
            "asking": found.asking,
            "carrying": _carrying(found) if found.asking else {},
            "residuals": profile.residuals | residuals,
            "rests_on": f"{profile.rests_on}, and {len(residuals)} of messages between {found.processes} processes",
        }
    )


def _carrying(found: Links) -> dict[str, Carry]:
    """Return what cores compute for a message of each kind, and for each of its bytes."""
    carrying = dict[str, Carry]()
    for kind in dict.fromkeys(one.kind for one in found.travelled):
        sent, computed = np.array([(one.sent, one.computed) for one in found.travelled if one.kind == kind]).T
        if (computed > 0).all():
            message, byte = _line(sent, computed)
            carrying[kind] = Carry(message=message, byte=byte)
    return carrying


def _line(x: Numbers, y: Numbers) -> tuple[float, float]:
    """Return the constant and the slope by which y is told best of x."""

    def told(values: Numbers) -> Numbers:
        return np.asarray(values[0] + values[1] * x)

    (constant, slope), _ = fit(told, np.array([y.min(), y.max() / x.max()]), y)
    return float(constant), float(slope)


def _fitted(
    profile: DeviceProfile, cluster: Cluster, level: Link, found: Links, some: Sequence[Travelled], begin: LinkRate
) -> tuple[LinkRate, Numbers]:
    """Return the share and latency by which these collectives are told best, and log(measured / told) of each."""
    ranks = tuple(range(found.processes))

    def rate(values: Numbers) -> LinkRate:
        share, latency = (Figure(median=float(one)) for one in values)
        return LinkRate(share=share, latency=latency)

    def told(values: Numbers) -> Numbers:
        fabric = Fabric(cluster, _linked(profile, level, rate(values)))
        return np.array([fabric.transfer(one.kind, one.sent, ranks).seconds for one in some])

    took = np.array([one.seconds for one in some])
    values, off = fit(told, np.array([begin.share.median, begin.latency.median]), took)
    return rate(values), off


def _linked(profile: DeviceProfile, level: Link, rate: LinkRate) -> DeviceProfile:
    return profile.model_copy(update={"links": profile.links | {level.name: rate}})

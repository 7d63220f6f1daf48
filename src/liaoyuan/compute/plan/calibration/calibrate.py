"""What the card and the links at hand really give, measured in minutes: a device profile from many short timings.

Steps of small models are taken apart into their calls (`calls.py`), which are timed in rounds, so that a disturbance
spoils one round of many and not one figure; of each the fastest counts, as nothing makes work faster than it is.
Figures are fitted so that what `cost.seconds` tells comes nearest to all of them (`fit.py`).
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from liaoyuan.compute.plan.calibration.calls import Clock, Step, Timed, step_of, streams
from liaoyuan.compute.plan.calibration.fit import Numbers, fit
from liaoyuan.compute.plan.machine.cluster import Cluster
from liaoyuan.compute.plan.machine.cost import NONE, seconds
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, OperatorRate, ProductRate, assumed
from liaoyuan.compute.plan.program.dry_run import Job
from liaoyuan.compute.plan.program.work import Work
from liaoyuan.device import Device
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.training.loop import TrainConfig

DTYPES = ("bfloat16", "float32")
ROUNDS = 60  # at most; of which as many are made as there is time for, at least `LEAST_ROUNDS`
LEAST_ROUNDS = 3
CPU_SLICE, SLICE = 1e-3, 5e-3  # seconds that a call is repeated for in a round
WAITING = ("_local_scalar_dense",)  # is no work of the card
MOST_SPREAD = 0.5
SMALLEST = 1e5  # bytes of a stream of which the memory's rate is told


@dataclass(frozen=True)
class Small:
    """A model of one layer whose step is taken apart: sizes, and rows of a step of `length` tokens."""

    hidden: int
    ffn: int
    heads: int
    head: int
    vocabulary: int
    rows: int
    length: int
    experts: int = 0
    microbatches: int = 1


CPU_MODELS = (
    Small(32, 64, 2, 16, 128, 2, 32),
    Small(96, 256, 3, 32, 512, 4, 128),
    Small(256, 704, 4, 64, 2048, 4, 256, microbatches=2),
    Small(448, 1216, 7, 64, 6144, 2, 512),
    Small(256, 128, 4, 64, 1024, 4, 128, experts=8),
    Small(128, 96, 4, 32, 512, 8, 128, experts=8),
)
CARD_MODELS = (
    Small(64, 128, 2, 32, 128, 2, 32),
    Small(512, 1536, 8, 64, 8192, 2, 512),
    Small(1024, 2816, 8, 128, 32768, 4, 2048),
    Small(2048, 5632, 16, 128, 65536, 4, 4096, microbatches=2),
    Small(4096, 14336, 32, 128, 128256, 1, 8192),
    Small(2048, 768, 16, 128, 32768, 4, 2048, experts=16),
    Small(4096, 1536, 32, 128, 65536, 2, 4096, experts=16),
)


def calibrate(
    cluster: Cluster, device: Device, minutes: float = 5.0, report: Report = silent, dtypes: Sequence[str] = DTYPES
) -> DeviceProfile:
    """Return the profile of the card that this process computes on; of its links, what is assumed of the cluster's.

    Args:
        cluster: what such a card should give. On a CPU a card is one core: one thread computes.
        minutes: that it may take, without what it takes to begin.
        dtypes: of the steps that are taken apart, by torch's names.
    """
    threads = torch.get_num_threads()
    if device.is_cpu:
        torch.set_num_threads(1)
    try:
        calls, steps = prepare(device, dtypes, report)
        found = measure(calls, steps, Clock(device), minutes * 60, report)
    finally:
        torch.set_num_threads(threads)
    return fitted(assumed(cluster), found, device.is_cpu)


def prepare(device: Device, dtypes: Sequence[str], report: Report = silent) -> tuple[list[Timed], list[Step]]:
    """Return the calls and the whole steps that are to be timed."""
    calls, steps = list[Timed](), list[Step]()
    models = CPU_MODELS if device.is_cpu else CARD_MODELS
    for dtype in dtypes:
        calls += streams(device, getattr(torch, dtype))
        for number, small in enumerate(models):
            report(Progress(number, len(models), "model", f"a layer of {small.hidden} in {dtype}"))
            sparse = f", {small.experts} experts" if small.experts else ""
            step, more = step_of(_job(small, dtype, device), device, f"step.{dtype} hidden {small.hidden}{sparse}")
            steps.append(step)
            calls += more
    return list({one.name: one for one in calls}.values()), steps


def _job(small: Small, dtype: str, device: Device) -> Job:
    experts = {"num_experts": small.experts, "num_experts_per_tok": 2, "moe_intermediate_size": small.ffn}
    values: dict[str, Any] = {
        "model_type": "qwen3_moe" if small.experts else "qwen3",
        "vocab_size": small.vocabulary,
        "hidden_size": small.hidden,
        "intermediate_size": small.ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": small.heads,
        "num_key_value_heads": small.heads,
        "head_dim": small.head,
        "max_position_embeddings": small.length,
        "torch_dtype": dtype,
    }
    config = config_from_dict(values | (experts if small.experts else {}))
    train = TrainConfig(steps=2, batch_tokens=small.rows * small.length, microbatches=small.microbatches, clip=1e9)
    return Job(config, Layout(), 1, small.length, train, device.type)


@dataclass(frozen=True)
class Measured:
    """Seconds of each call and of each step, with its work."""

    calls: tuple[tuple[Timed, float], ...]
    steps: tuple[tuple[Step, float], ...]


def measure(
    calls: Sequence[Timed],
    steps: Sequence[Step],
    clock: Clock,
    limit: float,
    report: Report = silent,
    beside: Sequence[Step] = (),
    typical: Callable[[Sequence[float]], float] = min,
) -> Measured:
    """Time everything in rounds until `limit` seconds are over, at least `LEAST_ROUNDS`, and return the fastest.

    beside: further steps that are timed as wholes alone. typical: what of the rounds counts, if not the fastest.
    """
    slice_ = CPU_SLICE if clock.is_cpu else SLICE
    alone = [list[float]() for _ in calls]
    whole = {step.name: list[float]() for step in (*steps, *beside)}
    inside = [list[list[float]]() for _ in steps]
    begin, turn, total = time.monotonic(), 0, 1  # how many rounds there is time for, the first has yet to show
    size = len(calls) + len(steps) + len(beside)
    while turn < total:
        start, unit = time.monotonic(), "timing" if turn else "first timing"
        for number, call in enumerate(calls):
            report(Progress(turn * size + number, total * size, unit, call.work.operator))
            alone[number].append(clock.seconds(call.make, slice_))
        for number, step in enumerate((*steps, *beside)):
            report(Progress(turn * size + len(calls) + number, total * size, unit, step.name))
            whole[step.name].append(clock.step(step.take))
            if clock.is_cpu and number < len(steps):
                inside[number].append(step.watch())
        now, turn = time.monotonic(), turn + 1
        total = max(LEAST_ROUNDS, min(ROUNDS, turn + int((limit - (now - begin)) / (now - start))))
    report(Progress(total * size, total * size, "timing"))
    found = [(call, typical(took)) for call, took in zip(calls, alone, strict=True)]
    if clock.is_cpu:
        found += _inside(steps, [[typical(one) for one in zip(*rounds, strict=True)] for rounds in inside])
    return Measured(tuple(found), tuple((step, typical(whole[step.name])) for step in (*steps, *beside)))


def _inside(steps: Sequence[Step], took: Sequence[Sequence[float]]) -> Iterator[tuple[Timed, float]]:
    """Yield one call of each kind and shape in the steps, with the median of its seconds at its places there."""
    places: dict[tuple[str, Work], list[float]] = {}
    for step, each in zip(steps, took, strict=True):
        for name, work, one in zip(step.names, step.works, each, strict=True):
            if work.operator not in WAITING:
                places.setdefault((name, work), []).append(one)
    for (name, work), found in places.items():
        yield Timed(name, work, lambda: None), statistics.median(found)


def fitted(begin: DeviceProfile, found: Measured, one_after_other: bool = True) -> DeviceProfile:
    """Return the profile with which all that was measured is told best, and by how much each is off.

    one_after_other: whether the host waits for each call, as on a CPU, where it is the card.
    """
    profile = _memory(begin, [(one.work, took) for one, took in found.calls if one.work.kind == "stream"])
    groups: dict[str, list[tuple[Timed, float]]] = {}
    for call, took in found.calls:
        groups.setdefault(f"{call.work.operator}.{call.work.dtype}", []).append((call, took))
    profile = _products(profile, groups)
    residuals = dict[str, float]()
    for name, members in groups.items():
        rate, off = _operator([(call.work, took) for call, took in members], profile)
        profile = profile.model_copy(update={"operators": profile.operators | {name: rate}})
        residuals |= {call.name: float(one) for (call, _), one in zip(members, off, strict=True)}
    profile, more = _host(profile, found.steps) if one_after_other else (_ahead(profile, found.steps), {})
    return profile.model_copy(
        update={"residuals": residuals | more, "rests_on": f"{len(residuals)} timings of single calls on this machine"}
    )


def _memory(begin: DeviceProfile, timed: list[tuple[Work, float]]) -> DeviceProfile:
    """Fit the memory's rate, how much faster the cache is and how large, and what a call costs, to plain streams.

    Those that go into memory that exists: what the system asks for new memory is an operator's own affair.
    """
    plain = [(work, took) for work, took in timed if work.operator in ("copy_", "mul_") and work.traffic > SMALLEST]
    took = np.array([took for _, took in plain])

    def made(values: Numbers) -> DeviceProfile:
        memory, faster, cache, call = values.tolist()
        figures = {"memory": Figure(median=memory), "call": Figure(median=call)}
        return begin.model_copy(update=figures | {"cached_bytes": cache, "cached_speed": 1 + faster})

    largest = max(plain, key=lambda one: one[0].traffic)
    start = np.array([largest[0].traffic / largest[1], 1.0, 8e6, took.min() / 2])
    values, off = fit(lambda x: np.array([seconds(work, made(x)) for work, _ in plain]), start, took)
    profile, sigma = made(values), _spread(off)
    return profile.model_copy(
        update={
            "memory": Figure(median=profile.memory.median, sigma=sigma),
            "call": Figure(median=profile.call.median, sigma=sigma),
        }
    )


def _products(profile: DeviceProfile, groups: dict[str, list[tuple[Timed, float]]]) -> DeviceProfile:
    """Set each dtype's share of the peak to what its largest products reach."""
    products = dict(profile.products)
    for dtype, rate in products.items():
        reached = [
            call.work.flops / took
            for members in groups.values()
            for call, took in members
            if call.work.kind == "product" and call.work.dtype == dtype
        ]
        if reached:
            share = Figure(median=max(reached) / (rate.peak_tflops * 1e12), sigma=0.05)
            products[dtype] = rate.model_copy(update={"share": share} | _plain_tile(rate))
    return profile.model_copy(update={"products": products})


def _plain_tile(rate: ProductRate) -> dict[str, Any]:
    """Of a card without units that wait for each other, what is begun is measured, not assumed."""
    return {"tile": (1, 1, 1), "least": (1, 1), "half_k": 0.0} if rate.units == 1 else {}


def _operator(timed: list[tuple[Work, float]], profile: DeviceProfile) -> tuple[OperatorRate, Numbers]:
    """Fit what one operator reaches, with as many figures as its timings can tell: what only moved few bytes tells what
    its calls cost, and nothing of its rate.
    """
    works, took = [work for work, _ in timed], np.array([one for _, one in timed])
    name = f"{works[0].operator}.{works[0].dtype}"
    shapes = len({(work.m, work.n, work.k, work.traffic) for work in works})
    is_small = works[0].kind == "stream" and max(work.traffic for work in works) < SMALLEST
    if is_small:
        begin = [1.0]
    elif works[0].kind == "stream":
        begin = [1.0, 1.0, *([max(profile.cached_speed - 1, 0.1)] if shapes > 2 else [])]
    else:
        begin = [1.0, 1.0, *([4.0, 4.0, 16.0] if shapes > 3 else [])]

    def made(values: Numbers) -> OperatorRate:
        if is_small:
            return OperatorRate(share=1.0, calls=float(values[0]), near=profile.cached_speed)
        share, calls, *more = values.tolist()
        if works[0].kind == "stream":
            return OperatorRate(share=share, calls=calls, near=1 + more[0] if more else profile.cached_speed)
        return OperatorRate(share=share, calls=calls, half=(more[0], more[1], more[2]) if len(more) > 2 else NONE)

    def told(values: Numbers) -> Numbers:
        own = profile.model_copy(update={"operators": {name: made(values)}})
        return np.array([seconds(work, own) for work in works])

    values, off = fit(told, np.array(begin), took)
    return made(values), off


def _host(profile: DeviceProfile, steps: Sequence[tuple[Step, float]]) -> tuple[DeviceProfile, dict[str, float]]:
    """Fit what the host takes for each call to the steps: what their calls do not explain, by how many they are."""
    told = np.array([sum(seconds(work, profile) for work in step.works) for step, _ in steps])
    count = np.array([len(step.works) for step, _ in steps], dtype=float)
    took = np.array([one for _, one in steps])
    values, off = fit(lambda x: told + x[0] * count, np.array([profile.launch.median]), took)
    launch, unexplained = Figure(median=float(values[0]), sigma=0.1), Figure(median=1.0, sigma=_spread(off))
    residuals = {step.name: float(one) for (step, _), one in zip(steps, off, strict=True)}
    return profile.model_copy(update={"launch": launch, "step": unexplained}), residuals


def _ahead(profile: DeviceProfile, steps: Sequence[tuple[Step, float]]) -> DeviceProfile:
    """Set what the host takes for each call, where the card computes meanwhile, to that of the step with least work."""
    step, took = min(steps, key=lambda one: sum(work.flops for work in one[0].works))
    return profile.model_copy(update={"launch": Figure(median=took / len(step.works), sigma=0.2)})


def _spread(off: Iterable[float]) -> float:
    sizes = [abs(float(one)) for one in off]
    return min(1.4826 * statistics.median(sizes), MOST_SPREAD)

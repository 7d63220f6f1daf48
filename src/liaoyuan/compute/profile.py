"""Where a step's time goes, operator by operator, against what each operator's FLOPs and bytes allow on this device.

Steps are taken in pairs, one plain and one with a clock around every operator, so that what the measuring costs is
known; of each kind the fastest is shown, which other work on the machine has disturbed the least. A third kind of step,
before them, only counts FLOPs and bytes.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from liaoyuan.device import Device, measure_gemm_rate, measure_memory_rate
from liaoyuan.ops.cost import OWN, Cost, cost_of, group_of
from liaoyuan.ops.watch import Call, Watch
from liaoyuan.rundir import Progress, Report, silent

RATE_SECONDS = 0.5  # spent on measuring each rate
Name = tuple[str, str, str]  # phase, group, operator


@dataclass(frozen=True)
class Subject:
    """What is profiled: `step()` takes one step of `model`, the same every time."""

    model: nn.Module
    step: Callable[[], object]
    device: Device
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the reader: mode, tokens, dtype, ...


@dataclass(frozen=True)
class OperatorTime:
    """An operator in one phase of a step, all its calls together.

    roof_seconds: the least that its FLOPs and bytes take at the device's best rates. bound: which of the two it is.
    """

    phase: str
    group: str
    operator: str
    calls: float
    seconds: float
    flops: float
    traffic: float
    roof_seconds: float
    bound: str

    @property
    def roof_share(self) -> float:
        return self.roof_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Profile:
    """A step: `operators` + `between_seconds` + `measuring_seconds` = `step_seconds`; a plain step has no measuring.

    steps: how many were taken of either kind, of which the fastest is this.
    rates: FLOP/s of matrix products by dtype, and bytes/s as "memory", measured after the steps.
    """

    operators: tuple[OperatorTime, ...]
    step_seconds: float
    plain_step_seconds: float
    between_seconds: float
    measuring_seconds: float
    steps: int
    rates: Mapping[str, float]
    facts: Mapping[str, Any]

    def share(self, seconds: float) -> float:
        return seconds / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `share` is of `step_seconds`."""
        rows = [
            {
                **{name: getattr(row, name) for name in OperatorTime.__dataclass_fields__},
                "share": self.share(row.seconds),
                "roof_share": row.roof_share,
            }
            for row in self.operators
        ]
        names = ("step_seconds", "plain_step_seconds", "between_seconds", "measuring_seconds", "steps")
        numbers = {name: getattr(self, name) for name in names}
        return {**self.facts, **numbers, "rates": dict(self.rates), "operators": rows}


def profile(subject: Subject, steps: int, report: Report = silent) -> Profile:
    """Take `steps` pairs of steps, and two before them, and return where the time of a step goes."""
    subject.step()
    costs = _count(subject)
    plain: list[float] = []
    watched: list[tuple[float, dict[Name, float]]] = []
    for number in range(steps):
        kinds = [lambda: plain.append(_plain(subject)), lambda: watched.append(_watched(subject))]
        for take in kinds if number % 2 == 0 else reversed(kinds):  # whatever drifts meets both alike
            take()
        report(Progress(number + 1, steps, "step"))
    rates = _rates(subject.device, {cost.dtype for counter in costs.values() for cost in counter if cost.flops})
    step, spent = min(watched, key=lambda pair: pair[0])
    operators = [_operator(name, seconds, costs.get(name, Counter()), rates) for name, seconds in spent.items()]
    operators.sort(key=lambda row: -row.seconds)
    rest = max(0.0, step - sum(row.seconds for row in operators))
    measuring = min(rest, max(0.0, step - min(plain)))
    return Profile(tuple(operators), step, min(plain), rest - measuring, measuring, steps, rates, dict(subject.facts))


def grouped(operators: Iterable[OperatorTime]) -> list[OperatorTime]:
    """Return this package's operators by name and PyTorch's by group, the slowest first."""
    sums: dict[Name, list[OperatorTime]] = defaultdict(list)
    for row in operators:
        sums[row.phase, row.group, row.operator if row.group == OWN else row.group].append(row)
    rows = [_sum(name, parts) for name, parts in sums.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _sum(name: Name, parts: list[OperatorTime]) -> OperatorTime:
    calls, seconds, flops, traffic, roof = (
        sum(getattr(row, field) for row in parts) for field in ("calls", "seconds", "flops", "traffic", "roof_seconds")
    )
    longest = max(parts, key=lambda row: row.roof_seconds)
    return OperatorTime(*name, calls, seconds, flops, traffic, roof, longest.bound)


def _name(call: Call) -> Name:
    return call.phase, group_of(call.operator, call.function), call.operator


def _count(subject: Subject) -> dict[Name, Counter[Cost]]:
    """Take a step and return what its calls cost."""
    costs: defaultdict[Name, Counter[Cost]] = defaultdict(Counter)

    def around(call: Call, compute: Callable[[], Any]) -> Any:
        output = compute()
        costs[_name(call)][cost_of(call, output)] += 1
        return output

    with Watch(subject.model, around):
        subject.step()
    return costs


def _plain(subject: Subject) -> float:
    subject.device.synchronize()
    start = time.perf_counter()
    subject.step()
    subject.device.synchronize()
    return time.perf_counter() - start


def _watched(subject: Subject) -> tuple[float, dict[Name, float]]:
    """Take a step with a clock around every operator; return its seconds and each operator's."""
    clock = time.perf_counter
    wait = (lambda: None) if subject.device.is_cpu else subject.device.synchronize
    times: list[tuple[str, str, Any, float]] = []

    def around(call: Call, compute: Callable[[], Any]) -> Any:
        wait()
        start = clock()
        output = compute()
        wait()
        times.append((call.phase, call.operator, call.function, clock() - start))  # the call holds tensors
        return output

    with Watch(subject.model, around):
        seconds = _plain(subject)
    spent: defaultdict[Name, float] = defaultdict(float)
    for phase, operator, function, duration in times:
        spent[phase, group_of(operator, function), operator] += duration
    return seconds, spent


def _rates(device: Device, dtypes: set[torch.dtype]) -> dict[str, float]:
    place = str(device.torch)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in sorted(dtypes, key=str)}
    products = {name: measure_gemm_rate(dtype, RATE_SECONDS, place) for dtype, name in names.items()}
    return {**products, "memory": measure_memory_rate(seconds=RATE_SECONDS, device=place)}


def _operator(name: Name, seconds: float, costs: Counter[Cost], rates: Mapping[str, float]) -> OperatorTime:
    """Return an operator's row; each of its calls has its own roof."""
    products = traffic = roof = 0.0
    for cost, count in costs.items():
        compute = cost.flops / rates[str(cost.dtype).removeprefix("torch.")] if cost.flops else 0.0
        move = cost.traffic / rates["memory"]
        products, traffic, roof = products + count * compute, traffic + count * move, roof + count * max(compute, move)
    calls = sum(costs.values())
    flops = sum(cost.flops * count for cost, count in costs.items())
    moved = sum(cost.traffic * count for cost, count in costs.items())
    return OperatorTime(*name, calls, seconds, flops, moved, roof, "products" if products > traffic else "memory")

"""Which kernel computes an operator on a device: the first that can be had here and passes its self-test.

The choice is made once per process, when the operator is first used on a kind of device, and is what `status` says.
The self-test compares with the reference in fp32, forward and backward, and what has passed it in a process is not
tested there again. Nothing fails for want of a kernel: the reference is used, and a warning says so once. `configure`
overrides the choice, and `seek_exactness` prefers kernels in which a row's bits are its own, for which there is a
fallback that is slower than the reference.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.operator import OPERATORS, Kernel, Operator, cast, in_clean_thread, outputs_and_gradients

LONG = 0.2  # seconds of measuring an operator, after which no further call is timed
REFERENCE, AUTO = "reference", "auto"
CONFIGURED = "chosen in the configuration"

_lock = threading.RLock()
_log = logging.getLogger("liaoyuan.ops")
_wanted: dict[str, str] = {}  # operator -> kernel, from the configuration
_exactness = False  # whether it was asked for
_through_registered = False  # whether operators are called by their registered names even where no kernel is in use
_in_use: dict[tuple[str, str], Callable[[bool], None]] = {}  # operator, kind of device -> what takes its kernel away
_passed: set[tuple[Operator, Kernel, str]] = set()  # which kernels passed their self-test on which kinds of device


def takes(operator: Operator, first: Tensor, *others: Tensor | None) -> bool:
    """Return whether a kernel is in use for these tensors: all of one dtype that it knows, on the device of the first.

    If so `operator.call` computes with it, else its reference is as good, and may know other dtypes.
    """
    dtype = first.dtype
    for other in others:
        if other is not None and other.dtype is not dtype:
            return False
    device = "cpu" if first.is_cpu else first.device.type  # to make a device costs as much as all the rest here
    return _through_registered or _has_kernel(operator.name, device, dtype)


def kernel_in_use(name: str, device: str) -> str:
    """Return the name of the kernel that computes an operator on a kind of device, or "reference"."""
    return _choose(name, device).kernel


def is_watched() -> bool:
    """Return whether `operators_called` is in force."""
    return _through_registered


@contextlib.contextmanager
def operators_called() -> Iterator[None]:
    """Call every operator by its registered name, whatever kernel is in use, so that who watches sees the same names.

    Whoever asks for this must see to it that the reference computes what no kernel can: `compute_with`.
    """
    global _through_registered
    before, _through_registered = _through_registered, True
    try:
        yield
    finally:
        _through_registered = before


def compute_with(kernel: str, name: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Compute a call of the registered operator `name` (or "..._backward") with this kernel, or by the reference.

    kernel: "auto" is the one in use; the reference computes where that is not the one asked for, or does not know the
        dtype.
    """
    operator = OPERATORS[name.removesuffix("_backward")]
    first = next(x for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
    chosen = _choose(operator.name, first.device.type)
    if kernel in (AUTO, chosen.kernel) and first.dtype in chosen.dtypes:
        return function(*inputs)
    if name == operator.name:
        return operator.reference(*inputs)
    assert operator.gradient
    return operator.gradient.reference(*inputs)


def configure(kernels: Mapping[str, str]) -> None:
    """Use these kernels ("reference" among them) for these operators; others are chosen as ever.

    Raises:
        LiaoyuanError: there is no such operator, or it has no such kernel.
    """
    for name, kernel in kernels.items():
        known = [REFERENCE, *(one.name for one in operator_named(name).kernels)]
        if kernel not in known:
            raise LiaoyuanError(f"The operator {name} has no kernel '{kernel}'. It has: {', '.join(known)}.")
    with _lock:
        if dict(kernels) == _wanted:
            return
        _take_away()
        _wanted.clear()
        _wanted.update(kernels)


def seek_exactness(asked: bool = True) -> None:
    """Use an exact kernel for every operator that has one here, be it slower; in the whole process, until told False.

    An operator whose reference is chosen in the configuration gets the exact form of the reference.
    """
    global _exactness
    with _lock:
        if asked is not _exactness:
            _take_away()
            _exactness = asked


def is_exactness_sought() -> bool:
    """Return what `seek_exactness` was told last."""
    return _exactness


def operator_named(name: str) -> Operator:
    """Return an operator; raises LiaoyuanError if there is none of this name."""
    if name not in OPERATORS:
        raise LiaoyuanError(f"There is no operator '{name}'. There are: {', '.join(sorted(OPERATORS))}.")
    return OPERATORS[name]


def forget() -> None:
    """Take all kernels away; they are chosen and tested anew when their operators are next used."""
    with _lock:
        _take_away()
        _passed.clear()


def _take_away() -> None:
    """Let kernels be chosen anew. A kernel that has passed its self-test in this process is not tested again."""
    with _lock:
        for use in _in_use.values():
            use(False)
        _in_use.clear()
        _choose.cache_clear()
        for operator in OPERATORS.values():
            operator.call._dispatch_cache.clear()  # torch remembers which kernel it traced


@dataclass(frozen=True)
class OperatorStatus:
    """Which kernel an operator uses on a kind of device, and why.

    exact: whether a row's bits are independent of the rows beside it; None: the reference's products, unknown.
    speed_up: against the reference; limit_share: of the speed that the device's matrix products and memory allow.
    """

    operator: str
    device: str
    kernel: str
    reason: str
    exact: bool | None
    dtypes: tuple[torch.dtype, ...] = ()
    speed_up: float | None = None
    limit_share: float | None = None


def status(device: str = "cpu") -> list[OperatorStatus]:
    """Return every operator's kernel in use on a kind of device, and the reason; chooses what was not chosen yet."""
    return [_choose(name, device) for name in OPERATORS]


def measure(device: str, dtype: torch.dtype, matrix_rate: float, memory_rate: float) -> list[OperatorStatus]:
    """Return `status` with each kernel's speed, on the operator's workload, forward alone.

    Args:
        matrix_rate: the best rate of matrix products of this dtype here, FLOP/s; memory_rate: of copying, bytes/s.
    """
    return [
        in_clean_thread(functools.partial(_measure, _choose(name, device), dtype, matrix_rate, memory_rate))
        for name in OPERATORS
    ]


def self_test(operator: Operator, kernel: Kernel, device: str) -> str | None:
    """Compare the registered operator with its reference in fp32; return what differs, or None."""
    for dtype in kernel.dtypes:
        for sample in operator.samples(dtype):
            placed = placed_on(device, sample)
            expected = outputs_and_gradients(operator, operator.reference, cast(placed, torch.float32))
            actual = outputs_and_gradients(operator, operator.call, placed)
            for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                difference = relative_difference(a, b)
                if not difference <= operator.tolerance[dtype]:
                    return f"result {index} in {str(dtype)[6:]} is off by {difference:.1e} of the largest element"
    return None


def placed_on(device: str, sample: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a sample with its tensors, those in lists too, on a device."""
    placed: tuple[Any, ...] = tree_map_only(Tensor, lambda x: x.to(device), sample)
    return placed


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|, in fp32; nan if shapes differ or values are not finite.

    Whole numbers (places, counts) are equal, or infinitely different.
    """
    if actual.shape != expected.shape:
        return float("nan")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max().clamp_min(1e-30)) if difference else 0.0


def _has_kernel(name: str, device: str, dtype: torch.dtype) -> bool:
    known = _choose(name, device).dtypes
    if known and dtype not in known and dtype.is_floating_point and len(known) > 1:
        names = " and ".join(_short(one) for one in known if one.is_floating_point)
        _warn(f"The kernels for {device} take {names}: the slower references compute {_short(dtype)}.")
    return dtype in known


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it: seconds at every start.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(name: str, device: str) -> OperatorStatus:
    with _lock:
        return in_clean_thread(lambda: _first_that_passes(OPERATORS[name], device))


def _first_that_passes(operator: Operator, device: str) -> OperatorStatus:
    wanted = _wanted.get(operator.name)
    chosen = OperatorStatus(operator.name, device, REFERENCE, CONFIGURED, None)
    if wanted == REFERENCE and not _exactness:
        return chosen
    reasons = ["the configuration has the reference"] if wanted == REFERENCE else []
    for kernel in _candidates(operator, wanted):
        if device in kernel.devices:
            reason = _reason_against(operator, kernel, device)
            if reason is None:
                why = CONFIGURED if wanted == kernel.name else "passed its self-test"
                if kernel.fallback and wanted != kernel.name:
                    why = "; ".join(["exactness was asked for", *reasons])
                return replace(chosen, kernel=kernel.name, reason=why, exact=kernel.exact, dtypes=kernel.dtypes)
            reasons.append(reason)
    if device != "meta" and not any(device in kernel.devices for one in OPERATORS.values() for kernel in one.kernels):
        _warn(f"No operator has a kernel for {device} yet: the slower references are used there.")
    return replace(chosen, reason="; ".join(reason.rstrip(".") for reason in reasons) or f"no kernel for {device} yet")


def _candidates(operator: Operator, wanted: str | None) -> list[Kernel]:
    """Return the kernels to be tried, in this order; with exactness asked for those that have it come first."""
    kernels = [one for one in operator.kernels if wanted == one.name or (wanted is None and not one.fallback)]
    if not _exactness:
        return kernels
    kernels += [one for one in operator.kernels if one.fallback and one not in kernels]
    return sorted(kernels, key=lambda kernel: not kernel.exact)


def _reason_against(operator: Operator, kernel: Kernel, device: str) -> str | None:
    """Put a kernel in use if it passes; return why it does not, or None."""
    try:
        use = kernel.load(operator.name, device)
    except LiaoyuanError as error:
        _warn(str(error))
        return str(error)
    use(True)
    known = (operator, kernel, device)
    try:
        reason = None if known in _passed else self_test(operator, kernel, device)
    except Exception as error:  # a kernel that raises is a kernel that fails
        reason = f"its self-test raised {type(error).__name__}: {error}"
    if reason is None:
        _passed.add(known)
        _in_use[operator.name, device] = use
        return None
    use(False)
    _warn(f"The {kernel.name} kernel of {operator.name} is not used: {reason}.")
    return reason


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _warn(text: str) -> None:
    _log.warning("%s", text)


def _measure(chosen: OperatorStatus, dtype: torch.dtype, matrix_rate: float, memory_rate: float) -> OperatorStatus:
    """Add the speed of a chosen kernel, on the operator's workload; in another dtype if it does not know this one."""
    operator = OPERATORS[chosen.operator]
    dtype = dtype if dtype in chosen.dtypes or not chosen.dtypes else chosen.dtypes[0]
    known = dtype in chosen.dtypes
    sample = operator.workload(dtype) if operator.workload else cast(list(operator.samples(dtype))[-1], dtype)
    placed = placed_on(chosen.device, sample)
    reference = _seconds(operator.reference, placed)
    own = _seconds(operator.call, placed) if known else reference
    least = max(operator.flops(*placed) / matrix_rate, operator.traffic(*placed) / memory_rate)
    return replace(chosen, speed_up=reference / own if known else None, limit_share=least / own)


def _seconds(function: Callable[..., Any], sample: tuple[Any, ...], repeats: int = 5) -> float:
    """Return the time of the fastest call; of few where one is long."""
    is_cpu = sample[0].device.type == "cpu"
    with torch.no_grad():
        if not is_cpu:
            function(*sample)  # the first one may compile
        times: list[float] = []
        while len(times) < repeats and sum(times) < LONG:
            start = time.perf_counter()
            function(*sample)
            if not is_cpu:
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    return min(times)

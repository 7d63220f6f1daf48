"""What an operator is: a reference that is its specification, rules for tracing, and a native kernel.

Each file of this room has one operator (or a pair). Its reference is plain PyTorch and works on any device. It is
registered through `torch.library` as `liaoyuan::name`, so that autograd, fake tensors and `torch.compile` see it.
The native kernel takes part only if it passes its self-test on this machine, against the reference, forward and
backward; this is decided once per process, when the operator is first used. Nothing fails without a compiler:
the reference is used, and a warning says so once.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops.build import find_library

LIBRARY = torch.library.Library("liaoyuan", "DEF")
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest element, against the reference in fp32

_lock = threading.RLock()
_log = logging.getLogger("liaoyuan.ops")


@dataclass(frozen=True)
class Gradient:
    """The backward side of an operator.

    inputs: positions of the operator's inputs that get a gradient.
    schema: of the operator `name_backward`, whose arguments are the outputs' gradients and what was saved.
    reference: computes it; fake: its shapes.
    flops: of the matrix products of a backward call with the arguments of the schema.
    save: (ctx, inputs, output), and apply: (ctx, *gradients), as `torch.library.register_autograd` wants them.
    """

    inputs: tuple[int, ...]
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    save: Callable[..., None]
    apply: Callable[..., Any]
    flops: Callable[..., int] = lambda *_: 0


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Args:
        name, schema: what `torch.library` registers, e.g. "swiglu" and "(Tensor gate_up) -> Tensor".
        reference: the specification, with all outputs of the schema.
        fake: the outputs' shapes and dtypes for fake tensors.
        gradient: the backward side, or None.
        samples: inputs of the self-test in a given dtype.
        flops, traffic: FLOPs of the matrix products (element-wise work does not count, as in PyTorch's own counter),
            and bytes read and written, of a forward call with these arguments.
        exact: whether a row's bits are independent of the other rows that the kernel computes with it.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.dtype], Iterable[tuple[Any, ...]]]
    flops: Callable[..., int]
    traffic: Callable[..., int]
    gradient: Gradient | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        LIBRARY.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _register(self.name, self.reference, self.fake)
        if self.gradient:
            LIBRARY.define(f"{self.name}_backward{self.gradient.schema}", tags=(torch.Tag.pt2_compliant_tag,))
            _register(f"{self.name}_backward", self.gradient.reference, self.gradient.fake)
            torch.library.register_autograd(
                f"liaoyuan::{self.name}", self.gradient.apply, setup_context=self.gradient.save, lib=LIBRARY
            )
            _count_flops(f"{self.name}_backward", self.gradient.flops)
        _count_flops(self.name, self.flops)
        object.__setattr__(self, "call", getattr(torch.ops.liaoyuan, self.name).default)

    def is_native(self, first: Tensor, *others: Tensor | None) -> bool:
        """Return whether the native kernel takes these tensors: on the CPU, of one dtype that it knows."""
        dtype = first.dtype
        if not first.is_cpu or dtype not in KERNEL_DTYPES:
            return False
        return all(other is None or other.dtype is dtype for other in others) and _kernel_in_use(self.name)

    call: Any = None  # the registered operator; set above

    def status(self, measure: bool = False) -> "OperatorStatus":
        """Choose the kernel if that has not been done, and return the choice."""
        reason = _choose(self.name)
        if reason is not None:
            return OperatorStatus(self.name, "reference", reason, True, None)
        speed_up = _in_clean_thread(lambda: _speed_up(self)) if measure else None
        return OperatorStatus(self.name, "native", "passed its self-test", self.exact, speed_up)


@dataclass(frozen=True)
class OperatorStatus:
    """Which kernel an operator uses on this machine, and why; speed_up is against the reference."""

    operator: str
    kernel: str
    reason: str
    exact: bool
    speed_up: float | None


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Enter the operator in the list that `status` and the choice of kernels read."""
    OPERATORS[operator.name] = operator
    return operator


def status(measure: bool = False) -> list[OperatorStatus]:
    """Return every operator's kernel in use and the reason; `measure` adds the speed against the reference."""
    return [operator.status(measure) for operator in OPERATORS.values()]


def wide(x: Tensor) -> Tensor:
    """Return x in the precision in which references compute: fp32, or fp64 if it is that already."""
    return x if x.dtype is torch.float64 else x.float()


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save an operator's inputs for its backward side: tensors as tensors, the rest as they are."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def saved_inputs(ctx: Any) -> list[Any]:
    """Return what `save_inputs` saved, in the order of the inputs."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def pull_back(
    function: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[int], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the gradients of `inputs[i] for i in wanted`, given those of the outputs, by PyTorch's autograd."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None]
        sources = [leaves[i] for i in wanted]
        found = torch.autograd.grad([out for out, _ in pairs], sources, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(sources, found, strict=True)]


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liaoyuan::{name}", fake, lib=LIBRARY)


def _count_flops(name: str, flops: Callable[..., int]) -> None:
    packet = getattr(torch.ops.liaoyuan, name)
    register_flop_formula(packet, get_raw=True)(lambda *inputs, out_val=None, **_: flops(*inputs))


@torch.compiler.assume_constant_result
def _kernel_in_use(name: str) -> bool:
    return _choose(name) is None


@functools.cache
def _choose(name: str) -> str | None:
    """Put the native kernel of operator `name` in use if it passes; return why it does not, or None."""
    with _lock:
        return _in_clean_thread(lambda: _reason_against(OPERATORS[name]))


def _reason_against(operator: Operator) -> str | None:
    reason = _load()
    if reason is None:
        torch.ops.liaoyuan_native.use(operator.name, True)
        try:
            reason = self_test(operator)
        except Exception as error:  # a kernel that raises is a kernel that fails
            reason = f"its self-test raised {type(error).__name__}: {error}"
        if reason is not None:
            torch.ops.liaoyuan_native.use(operator.name, False)
            _log.warning("The native kernel of %s is not used: %s.", operator.name, reason)
    return reason


@functools.cache
def _load() -> str | None:
    """Load the native library; return why it cannot be, or None."""
    try:
        torch.ops.load_library(find_library())
    except (LiaoyuanError, OSError) as error:
        _log.warning("%s", error)
        return str(error)
    return None


def _in_clean_thread(work: Callable[[], Any]) -> Any:
    """Run `work` where no mode of the caller (inference, fake tensors, tracing) is in force: modes are of a thread."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="liaoyuan-ops")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def self_test(operator: Operator) -> str | None:
    """Compare the registered operator with its reference in fp32; return what differs, or None."""
    for dtype in KERNEL_DTYPES:
        for sample in operator.samples(dtype):
            expected = _outputs_and_gradients(operator, operator.reference, _as(sample, torch.float32))
            actual = _outputs_and_gradients(operator, operator.call, sample)
            for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                difference = relative_difference(a, b)
                if not difference <= TOLERANCE[dtype]:
                    return f"result {index} in {str(dtype)[6:]} is off by {difference:.1e} of the largest element"
    return None


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|, in fp32; nan if shapes differ or values are not finite."""
    if actual.shape != expected.shape:
        return float("nan")
    if not expected.numel():
        return 0.0
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max().clamp_min(1e-30)) if difference else 0.0


def _as(sample: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in sample)


def _outputs_and_gradients(operator: Operator, function: Callable[..., Any], sample: tuple[Any, ...]) -> list[Tensor]:
    """Return what `function` gives (or changes in place), and for a differentiable operator the inputs' gradients."""
    if operator.gradient is None:
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in sample]
        outputs = function(*inputs)
        if outputs is None:
            return [x for x in inputs if isinstance(x, Tensor)]
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = operator.gradient.inputs
    leaves = [x.clone().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(sample)]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    compared = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in compared]
    sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(compared, sources, grads, allow_unused=True)
    return [out.detach() for out in compared] + [g for g in found if g is not None]


def _speed_up(operator: Operator) -> float:
    """Return the reference's time over the kernel's, on the largest sample: forward, and backward if there is one."""
    sample = list(operator.samples(torch.float32))[-1]

    def seconds(function: Callable[..., Any]) -> float:
        _outputs_and_gradients(operator, function, sample)
        times = []
        for _ in range(5):
            start = time.thread_time()
            _outputs_and_gradients(operator, function, sample)
            times.append(time.thread_time() - start)
        return min(times)

    return seconds(operator.reference) / max(seconds(operator.call), 1e-9)

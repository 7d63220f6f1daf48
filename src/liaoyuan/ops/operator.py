"""What an operator is: a reference that is its specification, rules for tracing, and kernels.

Each file of this room has one operator (or a pair). Its reference is plain PyTorch and works on any device. It is
registered through `torch.library` as `liaoyuan::name`, so that autograd, fake tensors and `torch.compile` see it.
Which kernel computes it on a device is decided in `choice.py`.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("liaoyuan", "DEF")
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}  # of the largest element, against the reference in fp32


@dataclass(frozen=True)
class Kernel:
    """A faster way to compute an operator on some kinds of device.

    name: what the configuration and `doctor ops` call it: "native", "triton", "npu".
    devices: kinds of device as torch names them.
    load: (operator's name, kind of device) makes the kernel ready and returns `use(on)`, which puts it behind the
        registered operator, forward and backward, or takes it away. Raises LiaoyuanError with the reason if it cannot.
    dtypes: those it takes; all tensors of floats have one, as a rule.
    exact: whether a row's bits are independent of the other rows that it computes with it.
    fallback: whether exactness is all that it has to give: it is used only where that was asked for, and no other
        kernel has it.
    """

    name: str
    devices: tuple[str, ...]
    load: Callable[[str, str], Callable[[bool], None]]
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    exact: bool = True
    fallback: bool = False


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
        kernels: faster ways, the first that passes its self-test on a device is used there.
        tolerance: of the self-test, by dtype: the largest difference from the reference in fp32, as a share of the
            largest element.
        workload: inputs of a size that work has, by dtype, on which speed is measured (None: the last of `samples`).
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.dtype], Iterable[tuple[Any, ...]]]
    flops: Callable[..., int]
    traffic: Callable[..., int]
    gradient: Gradient | None = None
    kernels: tuple[Kernel, ...] = ()
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    workload: Callable[[torch.dtype], tuple[Any, ...]] | None = None
    call: Any = None  # the registered operator; set below

    def __post_init__(self) -> None:
        LIBRARY.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _register(self.name, self.reference, self.fake)
        if self.gradient:
            LIBRARY.define(f"{self.name}_backward{self.gradient.schema}", tags=(torch.Tag.pt2_compliant_tag,))
            _register(f"{self.name}_backward", self.gradient.reference, self.gradient.fake)
            count = len(getattr(torch.ops.liaoyuan, self.name).default._schema.arguments)
            apply = functools.partial(_apply_if_any, self.gradient.apply, count)
            torch.library.register_autograd(
                f"liaoyuan::{self.name}", apply, setup_context=self.gradient.save, lib=LIBRARY
            )
            _count_flops(f"{self.name}_backward", self.gradient.flops)
        _count_flops(self.name, self.flops)
        object.__setattr__(self, "call", getattr(torch.ops.liaoyuan, self.name).default)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of `torch.nn.functional.linear`

OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Enter the operator in the list from which kernels are chosen."""
    OPERATORS[operator.name] = operator
    return operator


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
    # Below who watches every call, autograd is switched off for this thread.
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality):
        return in_clean_thread(functools.partial(pull_back, function, inputs, wanted, grads))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=False) if grad is not None]
        sources = [leaves[i] for i in wanted]
        found = torch.autograd.grad([out for out, _ in pairs], sources, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(sources, found, strict=True)]


def in_clean_thread(work: Callable[[], Any]) -> Any:
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


def _apply_if_any(apply: Callable[..., Any], count: int, ctx: Any, *grads: Tensor | None) -> Any:
    """Return the gradients of an operator's inputs; none if no output has one (what follows does not depend on it)."""
    return (None,) * count if all(grad is None for grad in grads) else apply(ctx, *grads)


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liaoyuan::{name}", fake, lib=LIBRARY)


def _count_flops(name: str, flops: Callable[..., int]) -> None:
    packet = getattr(torch.ops.liaoyuan, name)
    register_flop_formula(packet, get_raw=True)(lambda *inputs, out_val=None, **_: flops(*inputs))


def cast(sample: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the sample with its tensors of floats in this dtype."""
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in sample)


def outputs_and_gradients(operator: Operator, function: Callable[..., Any], sample: tuple[Any, ...]) -> list[Tensor]:
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
    followed = [out for out in outputs if out.requires_grad]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in followed]
    sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(followed, sources, grads, allow_unused=True)
    return [out.detach() for out in outputs] + [g for g in found if g is not None]

"""What every operator promises, asked of each: right on any shape, exact where it says so, known to tracing, frugal,
refused if it is wrong, and plain about mistakes.
"""

import os
import subprocess
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from liaoyuan import ops
from liaoyuan.ops import choice
from liaoyuan.ops.kernels import _put_behind
from liaoyuan.ops.operator import OPERATORS, Kernel, Operator, cast, outputs_and_gradients
from liaoyuan.ops.shapes import ShapeError
from tests.ops.cases import difference, torch_threads
from tests.ops.drawing import DRAWINGS, Draw, Drawing, Sample

BOTH = (torch.float32, torch.bfloat16)
DIFFERENTIABLE = [name for name, operator in OPERATORS.items() if operator.gradient]
ERROR = 4.0  # tolerances by which a planted error is off
DRAWN = settings(max_examples=20, derandomize=True, database=None)


def entry(name: str) -> Drawing:
    """Return what is known of an operator for its tests."""
    if name not in DRAWINGS:
        pytest.fail(
            f"The operator {name} has no entry in tests/ops/drawing.py. Add to DRAWINGS a function that draws its "
            "inputs for any number of rows, its public function, and which inputs have rows."
        )
    return DRAWINGS[name]


def sample_of(name: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0, **options: Any) -> Sample:
    draw: Any = entry(name).draw
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    sample = draw(Draw(rows, width, dtype, generator), **options)
    return (*sample, *(default for default in defaults(OPERATORS[name])[len(sample) :]))


def defaults(operator: Operator) -> list[Any]:
    return [argument.default_value for argument in operator.call._schema.arguments]


def argument_names(operator: Operator) -> list[str]:
    return [argument.name for argument in operator.call._schema.arguments]


def dtypes_of(name: str) -> list[torch.dtype]:
    """Those that the operator's kernel takes."""
    return [dtype for dtype in BOTH if dtype in choice._choose(name, "cpu").dtypes]


def is_exact(name: str) -> bool:
    (row,) = [row for row in ops.status() if row.operator == name]
    return bool(row.exact)


def first_sample(operator: Operator, dtype: torch.dtype = torch.float32) -> Sample:
    return next(iter(operator.samples(dtype)))


def leaves(operator: Operator, sample: Sample) -> Sample:
    wanted = operator.gradient.inputs if operator.gradient else ()
    return tuple(x.clone().requires_grad_(i in wanted) if torch.is_tensor(x) else x for i, x in enumerate(sample))


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if torch.is_tensor(outputs) else tuple(outputs or ())


@pytest.fixture
def native_only() -> None:
    reasons = {s.reason for s in ops.status() if s.kernel != "native"}
    if reasons:
        pytest.skip(f"no native kernels here: {reasons}")


def without_kernel(operator: Operator, work: Callable[[], Any]) -> Any:
    """Do `work` with the reference behind the registered operator."""
    switch(operator, False)
    try:
        return work()
    finally:
        switch(operator, True)


def switch(operator: Operator, on: bool) -> None:
    torch.ops.liaoyuan_native.use(operator.name, on)
    operator.call._dispatch_cache.clear()  # torch remembers which kernel it traced


# ---- right on any shape


def assert_right(name: str, sample: Sample, dtype: torch.dtype) -> None:
    """The kernel's results and gradients are those of the reference in fp64."""
    operator = OPERATORS[name]
    expected = outputs_and_gradients(operator, operator.reference, cast(sample, torch.float64))
    actual = outputs_and_gradients(operator, operator.call, sample)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"{name}, result {index}: {a.shape} instead of {b.shape}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{name}, result {index}"
        else:
            off = difference(a, b, floor=1.0)
            assert off <= operator.tolerance[dtype], f"{name}, result {index} of {dtype} is off by {off:.1e}"


ROWS = st.one_of(st.sampled_from([0, 1, 2, 31, 97]), st.integers(0, 140))
PAGED = ("paged_attention", "decoder_layer", "quantised_decoder_layer")
DOCUMENTS = ("attention", *PAGED)


@pytest.mark.parametrize("name", OPERATORS)
def test_kernel_and_gradients_are_right_on_any_shape(name: str, native_only: None) -> None:
    @DRAWN
    @given(ROWS, st.integers(1, 21), st.sampled_from(dtypes_of(name)), st.integers(0, 9))
    def check(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
        assert_right(name, sample_of(name, rows, width, dtype, seed), dtype)

    check()


@pytest.mark.parametrize("name", OPERATORS)
def test_kernel_and_gradients_are_right_on_the_edge_shapes(name: str, native_only: None) -> None:
    for dtype in dtypes_of(name):
        for rows, width in ((0, 3), (1, 1), (13, 17), (entry(name).huge, 7)):
            assert_right(name, sample_of(name, rows, width, dtype), dtype)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_may_all_have_one_token(name: str, native_only: None) -> None:
    for dtype in BOTH:
        for width in (4, 5, 7):  # plain, with sinks, with a window
            assert_right(name, sample_of(name, 97, width, dtype, ones=True), dtype)


def strided(x: Tensor, by: str) -> Tensor:
    """Return the same values with gaps between them, or in another order of dimensions."""
    if by == "slices":
        apart = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
        return apart.copy_(x)
    return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


@pytest.mark.parametrize("by", ["slices", "transposition"])
@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_and_gradients_need_not_be_contiguous(name: str, by: str, native_only: None) -> None:
    operator = OPERATORS[name]
    kept = entry(name).contiguous
    for dtype in dtypes_of(name):
        sample = sample_of(name, 13, 5, dtype)
        apart = tuple(
            strided(x, by) if torch.is_tensor(x) and x.dim() and argument not in kept else x
            for argument, x in zip(argument_names(operator), sample, strict=True)
        )
        expected = results(operator, sample, lambda x: x)
        actual = results(operator, apart, lambda x: strided(x, by) if x.dim() else x)
        for a, b in zip(actual, expected, strict=True):  # a sum in PyTorch may have another order
            assert difference(a, b) < 1e-6


def results(operator: Operator, sample: Sample, form: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return outputs and gradients (or what is changed in place); the outputs' gradients have the given form."""
    if operator.gradient is None:
        changed = [x.detach() if torch.is_tensor(x) else x for x in sample]
        outputs = operator.call(*changed)
        return list(tuple_of(outputs)) or [x for x in changed if torch.is_tensor(x)]
    given = [
        x.detach().requires_grad_(i in operator.gradient.inputs) if torch.is_tensor(x) else x
        for i, x in enumerate(sample)
    ]
    outputs = [out for out in tuple_of(operator.call(*given)) if out.requires_grad]
    grads = [form(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)) for out in outputs]
    sources = [x for x in given if torch.is_tensor(x) and x.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, sources, grads)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradients_rule_is_right_in_fp64(name: str, native_only: None) -> None:
    """Of the registered operator without its kernel: the reference, what it saves, and its backward side."""
    operator = OPERATORS[name]

    def followed(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(out for out in tuple_of(operator.call(*inputs)) if out.requires_grad)

    for width in (3, 5):
        inputs = leaves(operator, cast(sample_of(name, 4, width, torch.float32), torch.float64))
        assert without_kernel(operator, lambda given=inputs: torch.autograd.gradcheck(followed, given, fast_mode=True))


class Forgotten(torch.autograd.Function):
    """A function that does not depend on its input."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_output_on_which_nothing_depends_has_no_gradients(name: str, kernel: bool, native_only: None) -> None:
    operator = OPERATORS[name]
    inputs = leaves(operator, sample_of(name, 7, 5, torch.float32))
    sources = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]

    def gradients() -> Sequence[Tensor | None]:
        outputs = [Forgotten.apply(out) for out in tuple_of(operator.call(*inputs)) if out.requires_grad]
        return torch.autograd.grad([out.sum() for out in outputs], sources, allow_unused=True)

    found = gradients() if kernel else without_kernel(operator, gradients)
    assert all(grad is None or not grad.any() for grad in found)


# ---- exact


@pytest.mark.parametrize("name", [name for name, one in DRAWINGS.items() if one.part])
def test_a_rows_bits_depend_on_it_alone(name: str, native_only: None) -> None:
    """Wherever it stands, in a batch of one or of many, in chunks or whole, on one thread or two."""
    if not is_exact(name):
        pytest.skip("the operator does not promise this")
    operator, one = OPERATORS[name], entry(name)
    assert one.part
    for dtype in dtypes_of(name):
        for rows, width in ((37, 7), (150, 8)):
            sample = sample_of(name, rows, width, dtype)
            units = one.units(sample)
            whole = by_row(operator, one, sample, torch.arange(rows), rows)
            half = units // 2
            batches = ([0], [units - 1], [*range(half)], [*range(half, units)], [*reversed(range(units))])
            for threads in (1, 2):
                with torch_threads(threads):
                    for batch in batches:
                        some, chosen = one.part(sample, batch)
                        for a, b in zip(by_row(operator, one, some, chosen, rows), whole, strict=True):
                            assert torch.equal(a, b[chosen]), f"{name}, {dtype}, units {batch}, {threads} threads"


def by_row(operator: Operator, one: Drawing, sample: Sample, chosen: Tensor, rows: int) -> list[Tensor]:
    """Return outputs and gradients that have rows; an output's gradient is that of the chosen rows of all."""
    wanted = operator.gradient.inputs if operator.gradient else ()
    places = [i for i in one.rows if i in wanted]
    given = [x.detach().requires_grad_(i in places) if torch.is_tensor(x) else x for i, x in enumerate(sample)]
    outputs = tuple_of(operator.call(*given))
    found = [outputs[i] for i in one.output_rows]
    followed = [out for out in found if out.requires_grad]
    if not followed:
        return found
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(rows, *out.shape[1:], generator=generator)[chosen].to(out) for out in followed]
    gradients = torch.autograd.grad(followed, [given[i] for i in places], grads)
    return [out.detach() for out in found] + list(gradients)


def workload(operator: Operator, dtype: torch.dtype) -> Sample:
    sample = operator.workload(dtype) if operator.workload else list(operator.samples(dtype))[-1]
    return (*sample, *defaults(operator)[len(sample) :])


@pytest.mark.parametrize("name", OPERATORS)
def test_two_threads_give_the_bits_of_one(name: str, native_only: None) -> None:
    if not is_exact(name):
        pytest.skip("the operator does not promise this")
    operator = OPERATORS[name]
    sample = workload(operator, dtypes_of(name)[-1])
    one = outputs_and_gradients(operator, operator.call, sample)
    with torch_threads(2):
        two = outputs_and_gradients(operator, operator.call, sample)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- known to tracing


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_as_torch_wants_it(name: str) -> None:
    operator = OPERATORS[name]
    ops.status()  # the choice is made
    torch.library.opcheck(operator.call, leaves(operator, first_sample(operator)))


@pytest.mark.parametrize("name", OPERATORS)
def test_so_are_their_references(name: str, native_only: None) -> None:
    operator = OPERATORS[name]

    def check() -> None:
        torch.library.opcheck(operator.call, leaves(operator, first_sample(operator)))
        wide_alone = replace(operator.kernels[0], dtypes=(dtypes_of(name)[0],))  # in bf16 PyTorch rounds on the way
        assert choice.self_test(operator, wide_alone, "cpu") is None

    without_kernel(operator, check)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_shapes_strides_and_dtypes_of_real_ones(name: str) -> None:
    operator = OPERATORS[name]
    for dtype in dtypes_of(name) or [torch.float32]:
        samples = [sample_of(name, rows, 5, dtype) for rows in (0, 7)] + list(operator.samples(dtype))
        for sample in samples:
            real = [form(x) for x in outputs_and_gradients(operator, operator.call, sample)]
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = tuple(mode.from_tensor(x) if torch.is_tensor(x) else x for x in sample)
                fake = [form(x) for x in outputs_and_gradients(operator, operator.call, fakes)]
            assert fake == real


def form(x: Tensor) -> tuple[Any, ...]:
    strides = x.stride() if x.numel() > 1 else ()  # of one element they mean nothing
    return tuple(x.shape), strides, x.dtype, x.device


@pytest.mark.parametrize("name", OPERATORS)
def test_public_functions_are_compiled_whole(name: str) -> None:
    """No break in the graph, forward and backward, and the values of the function that is not compiled."""
    operator, one = OPERATORS[name], entry(name)
    given = leaves(operator, sample_of(name, 7, 5, torch.float32))
    arguments = one.named(given)
    function = one.public if arguments else operator.call
    inputs: Any = arguments or dict(zip(argument_names(operator), given, strict=True))
    expected = called(function, inputs)
    torch._dynamo.reset()
    compiled = called(torch.compile(function, backend="aot_eager", fullgraph=True), inputs)
    assert len(compiled) == len(expected)
    for a, b in zip(compiled, expected, strict=True):
        assert difference(a, b, floor=1.0) < 1e-5


def test_sizes_may_be_symbols() -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, 1e-6)

    x, weight = torch.randn(4, 8), torch.ones(8)
    assert torch.equal(make_fx(norm, tracing_mode="symbolic")(x, weight)(x[:3], weight), norm(x[:3], weight))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 2, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x, weight), norm(x, weight))


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """Return what a call gives or changes, and the gradients."""
    copied = {name: copies_of(x) for name, x in arguments.items()}
    outputs = [x for x in tuple_of(function(**copied)) if torch.is_tensor(x)]
    sources = [x for x in copied.values() if torch.is_tensor(x) and x.requires_grad]
    if not outputs:
        return [x for value in copied.values() for x in (value if isinstance(value, list) else [value]) if
                torch.is_tensor(x)]  # fmt: skip
    followed = [out for out in outputs if out.requires_grad]
    if not followed:
        return outputs
    gradients = torch.autograd.grad([out.float().square().sum() for out in followed], sources, allow_unused=True)
    return [*(x.detach() for x in outputs), *(x for x in gradients if x is not None)]


def copies_of(x: Any) -> Any:
    if isinstance(x, list):
        return [copies_of(one) for one in x]
    return x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x


# ---- costs


@pytest.mark.parametrize("name", OPERATORS)
def test_flops_are_those_of_pytorchs_counter(name: str) -> None:
    operator, one = OPERATORS[name], entry(name)
    for width in (4, 5, 7):
        sample = sample_of(name, 29, width, torch.float32)
        if name in PAGED:  # lengths are not known when FLOPs are asked for: as if every table were full
            sample = workload(operator, torch.float32)
        given = leaves(operator, sample)
        function = one.products or operator.reference
        forward_share, backward_share = one.share(sample)
        with FlopCounterMode(display=False) as counter:
            outputs = [out for out in tuple_of(function(*given)) if out.is_floating_point()]
        assert operator.flops(*sample) == pytest.approx(forward_share * counter.get_total_flops(), abs=0.5)
        if operator.gradient is None:
            continue
        followed = [out for out in outputs if out.requires_grad]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad([out.sum() for out in followed], [x for x in given if torch.is_tensor(x) and
                                x.requires_grad], allow_unused=True)  # fmt: skip
        expected = backward_share * counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            outputs_and_gradients(operator, operator.call, sample)
        assert counter.get_total_flops() - operator.flops(*sample) == pytest.approx(expected, abs=0.5)


MEMORY = """
import sys, torch
from pathlib import Path
from liaoyuan import ops
from liaoyuan.ops.operator import OPERATORS, outputs_and_gradients
from tests.ops.test_promises import most_bytes, resident, workload
from tests.ops.drawing import DRAWINGS

def most():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])

ops.status()
for name, operator in OPERATORS.items():
    one = DRAWINGS[name]
    sample = one.memory(torch.bfloat16) if one.memory else workload(operator, torch.bfloat16)
    if torch.bfloat16 not in ops.choice._choose(name, "cpu").dtypes:
        sample = tuple(x.float() if torch.is_tensor(x) and x.dtype is torch.bfloat16 else x for x in sample)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    outputs_and_gradients(operator, operator.call, sample)
    print(name, most() - before, most_bytes(operator, sample))
"""
OWN_BYTES = 12 * 2**20  # of a thread's buffers, and of pages that the allocator takes in advance


def resident() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])


def most_bytes(operator: Operator, sample: Sample) -> int:
    """Bytes that a forward and backward call may need: what forward reads and writes, and in fp32 once more (copies of
    the inputs, outputs, gradients of both), or what the weight's gradient takes.
    """
    times = 4 if operator.gradient else 2
    return times * operator.traffic(*sample) + OWN_BYTES


def test_forward_and_backward_need_no_more_than_a_few_times_what_they_read_and_write(native_only: None) -> None:
    if sys.platform != "linux":
        pytest.skip("asks Linux for the peak of resident memory")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    found = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = [line.split() for line in found.stdout.splitlines()]
    assert {row[0] for row in rows} == set(OPERATORS)
    assert not [row for row in rows if int(row[1]) > int(row[2])]


# ---- refused if it is wrong


def planted() -> list[Any]:
    """Every result of every operator, forward and backward."""
    found = []
    for name, operator in OPERATORS.items():
        count = len(operator.call._schema.returns) or len(changed_places(operator))
        found += [pytest.param(name, "forward", i, id=f"{name}-{i}") for i in range(count)]
        if operator.gradient:
            backward = getattr(torch.ops.liaoyuan, f"{name}_backward").default._schema.returns
            found += [pytest.param(name, "backward", i, id=f"{name}_backward-{i}") for i in range(len(backward))]
    return found


def changed_places(operator: Operator) -> list[int]:
    arguments = operator.call._schema.arguments
    return [i for i, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write]


@pytest.mark.parametrize("where", ["first", "last", "row"])
@pytest.mark.parametrize(("name", "side", "index"), planted())
def test_a_kernel_that_is_off_by_little_in_one_place_is_refused(
    name: str, side: str, index: int, where: str, native_only: None
) -> None:
    operator = OPERATORS[name]

    def wrong(reference: Callable[..., Any], places: Sequence[int], error: float) -> Callable[..., Any]:
        def kernel(*inputs: Any) -> Any:
            outputs = reference(*inputs)
            results = [inputs[i] for i in places] if outputs is None else list(tuple_of(outputs))
            results[index] = spoilt(results[index], error, where)
            if outputs is None:
                inputs[places[index]].copy_(results[index])
                return None
            return results[0] if torch.is_tensor(outputs) else tuple(results)

        return kernel

    for dtype in dtypes_of(name):
        module, error = types.ModuleType("wrong"), ERROR * operator.tolerance[dtype]
        if side == "forward":
            setattr(module, name, wrong(operator.reference, changed_places(operator), error))
        else:
            assert operator.gradient
            setattr(module, f"{name}_backward", wrong(operator.gradient.reference, (), error))
        kernel = Kernel("wrong", ("cpu",), lambda *_: lambda on: None, dtypes=(dtype,))

        def check(kernel: Kernel = kernel, module: types.ModuleType = module) -> str | None:
            _put_behind(module, name, "cpu", True)
            try:
                return choice.self_test(operator, kernel, "cpu")
            finally:
                _put_behind(module, name, "cpu", False)

        reason = without_kernel(operator, check)
        assert reason is not None and "off by" in reason


def spoilt(x: Tensor, error: float, where: str) -> Tensor:
    """Return x with one element (or row) off by this share of the largest; another place or count by one."""
    if not x.numel():
        return x
    result = x.clone()
    rows = result.view(-1) if where != "row" or not x.dim() else result[-1:]
    part = rows[:1] if where == "first" else rows[-1:]
    if x.is_floating_point():
        part += error * x.abs().max() or 1.0
    else:
        part += 1
    return result


# ---- plain about mistakes


def mistakes(arguments: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (what is wrong, of which argument, the arguments): dtypes, devices, dimensions, sizes."""
    lists = {name for name, x in arguments.items() if isinstance(x, list) and torch.is_tensor(x[0])}
    tensors = {
        name: x[0] if name in lists else x for name, x in arguments.items() if name in lists or torch.is_tensor(x)
    }
    found = []
    for name, x in tensors.items():
        other = x.long() if x.is_floating_point() else x.float()
        changed = {"dtype": other, "dimensions": x[None], "fewer dimensions": x[0]}
        if len(tensors) > 1:
            changed["device"] = x.to("meta")
        for dim, size in enumerate(x.shape):
            changed[f"size {dim} more"] = torch.cat((x, x.narrow(dim, 0, 1)), dim)
            changed[f"size {dim} less"] = x.narrow(dim, 0, size - 1)
        found += [(what, name, {**arguments, name: [y] if name in lists else y}) for what, y in changed.items()]
    return found


def error_of(function: Callable[..., Any], arguments: dict[str, Any]) -> Exception | None:
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "checksum"])  # which takes any tensor
def test_mistakes_are_named_alike_by_kernels_and_references(name: str, native_only: None) -> None:
    one = entry(name)
    cases = mistakes(one.named(sample_of(name, 13, 5, torch.float32)))
    with_kernel = [error_of(one.public, arguments) for _, _, arguments in cases]
    ops.configure({name: "reference"})
    try:
        with_reference = [error_of(one.public, arguments) for _, _, arguments in cases]
    finally:
        ops.configure({})
    for (what, argument, arguments), a, b in zip(cases, with_kernel, with_reference, strict=True):
        said = f"{name}, {what} of {argument}: {a!r} and {b!r}"
        if isinstance(a, ShapeError) or isinstance(b, ShapeError) or what in ("dtype", "device"):
            assert type(a) is type(b) is ShapeError and str(a) == str(b), said
            wrong = arguments[argument]
            shape = (wrong[0] if isinstance(wrong, list) else wrong).shape
            assert argument in str(a) and str(list(shape)) in str(a), said
    assert any(isinstance(error, ShapeError) for error in with_kernel)

"""The pattern of an operator: registered for tracing, chosen by its self-test, harmless where no compiler is."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS
from tests.ops.cases import boundaries_of, random


@pytest.fixture
def native_only():
    reasons = {s.reason for s in ops.status() if s.kernel != "native"}
    if reasons:
        pytest.skip(f"no native kernels here: {reasons}")


def test_all_kernels_are_in_use_on_this_machine(native_only):
    for status in ops.measure("cpu", torch.float32, matrix_rate=1e11, memory_rate=1e10):
        assert status.kernel == "native"
        assert status.speed_up is not None and status.limit_share is not None
        assert status.speed_up > 0 and status.limit_share > 0


@pytest.fixture
def afresh():
    """Kernels are chosen anew in the test and after it."""
    choice.forget()
    yield
    ops.configure({})


def test_a_kernel_that_fails_its_self_test_is_not_used(native_only, afresh, monkeypatch, caplog):
    operator = OPERATORS["swiglu"]
    wrong = type("Wrong", (), {})()
    wrong.__dict__.update(vars(operator))
    wrong.reference = lambda gate_up: operator.reference(gate_up) * 1.1
    monkeypatch.setitem(OPERATORS, "swiglu", wrong)
    gate_up = random(4, 32)
    assert not choice.takes(operator, gate_up)
    (status,) = [row for row in ops.status() if row.operator == "swiglu"]
    assert status.kernel == "reference" and "off by" in status.reason and "swiglu" in caplog.text
    assert torch.equal(ops.swiglu(gate_up), operator.reference(gate_up))
    monkeypatch.undo()
    choice.forget()
    assert choice.takes(operator, gate_up)


def test_the_choice_may_fall_in_inference_mode_or_under_fake_tensors(native_only, afresh):
    with torch.inference_mode():
        assert choice.takes(OPERATORS["swiglu"], random(2, 4))
    choice.forget()
    with FakeTensorMode():
        assert ops.swiglu(torch.empty(3, 8)).shape == (3, 4)


def test_the_configuration_overrides_the_choice(native_only, afresh):
    ops.configure({"swiglu": "reference", "rms_norm": "native"})
    kernels = {row.operator: (row.kernel, row.reason) for row in ops.status()}
    assert kernels["swiglu"] == ("reference", "chosen in the configuration")
    assert kernels["rms_norm"] == ("native", "chosen in the configuration")
    assert kernels["linear"] == ("native", "passed its self-test")
    assert not choice.takes(OPERATORS["swiglu"], random(2, 4))


@pytest.mark.parametrize(
    ("kernels", "said"),
    [({"swish": "native"}, "no operator 'swish'"), ({"swiglu": "cuda"}, "no kernel 'cuda'. It has: reference, native")],
)
def test_a_kernel_that_does_not_exist_is_refused(kernels, said):
    with pytest.raises(LiaoyuanError, match=said):
        ops.configure(kernels)


def test_a_compiled_function_and_its_gradients_equal_the_eager_ones():
    def loss(x, weight):
        total, out = ops.add_rms_norm(x, 2 * x, weight, 1e-6)
        qkv = torch.cat((out, out), -1)
        q, k, v = ops.split_rotary(qkv, angle.cos(), angle.sin(), 1, 8)
        mixed = ops.attention(q, k, v, boundaries_of([3, 5]), 0.3).flatten(1)
        return ops.token_log_prob(ops.swiglu(mixed), head, targets).sum() + total.sum()

    angle, head, targets = random(8, 4), random(11, 8), torch.arange(8)
    inputs = [random(8, 16, seed=1).requires_grad_(), torch.ones(16).requires_grad_()]
    eager = loss(*inputs)
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.allclose(eager, traced)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(traced, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        hidden = random(4, 8).requires_grad_()
        ops.token_log_prob(hidden, random(16, 8), torch.zeros(4, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 8 * 16


SCRIPT = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
x = torch.randn(4, 8).requires_grad_()
ops.swiglu(x).sum().backward()
ops.rms_norm(x, torch.ones(8), 1e-6)
print(*{(s.kernel, s.reason) for s in ops.status()})
"""


def run(environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_compiler_the_references_work_and_it_is_said_once(tmp_path):
    output = run({"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})
    assert "('reference', 'There is no C++ compiler" in output
    assert output.count("LOG") == 1


def test_tensors_in_lists_of_a_sample_are_brought_to_the_device_too():
    sample = next(iter(OPERATORS["quantised_decoder_layer"].samples(torch.float32)))
    assert any(isinstance(x, list) and any(map(torch.is_tensor, x)) for x in sample)  # else it would show nothing
    placed = [x for x in tree_leaves(choice.placed_on("meta", sample)) if torch.is_tensor(x)]
    assert placed and {x.device.type for x in placed} == {"meta"}

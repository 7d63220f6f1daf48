"""What a card needs of the kernels: they compile for it, fit it, and are used where one is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liaoyuan import ops
from liaoyuan.errors import LiaoyuanError
from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS
from tests.conftest import slow_if
from tests.ops.triton.conftest import CARD, DEVICE, WITH_TRITON, triton_kernel

SMALLEST_CARD = 99 * 1024  # bytes of shared memory of a program, compute capabilities 8.6 and 8.9
FEW_BYTES = 64  # of a thread that spill: some addresses
ROOT = Path(__file__).parents[3]


def run(*command: str, cache: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's compiler, which is for Linux")
@pytest.mark.parametrize("kinds", ["hardest", slow_if(True, "all")])
def test_every_kernel_compiles_for_a_card_and_fits_it(tmp_path, kinds):
    printed = run("-m", "tests.ops.triton.compiled", "80", "bfloat16", kinds, "128", cache=tmp_path)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert {line["operator"] for line in lines} == set(WITH_TRITON)
    for line in lines:
        assert line["shared"] <= SMALLEST_CARD, line
        assert line["spilled"] <= FEW_BYTES, line


def test_no_kernel_is_loaded_before_it_is_needed(tmp_path):
    script = "import sys, liaoyuan.models; print(*(m for m in sys.modules if m.startswith('liaoyuan.ops.triton')))"
    assert run("-c", script, cache=tmp_path).strip() == ""


def test_where_triton_is_not_installed_the_reason_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LiaoyuanError, match="pip install triton"):
        triton_kernel(OPERATORS["swiglu"]).load("swiglu", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CARD, reason="needs an accelerator, and there is none here")
@pytest.mark.parametrize("name", WITH_TRITON)
def test_the_self_test_passes_on_the_card_in_every_dtype(name, use):
    operator = use(name)
    assert choice.self_test(operator, triton_kernel(operator), DEVICE) is None


@pytest.mark.gpu
@pytest.mark.skipif(not CARD, reason="needs an accelerator, and there is none here")
def test_the_card_uses_the_kernels():
    chosen = {row.operator: row.kernel for row in ops.status(DEVICE)}
    for name in WITH_TRITON:
        assert chosen[name] == ("reference" if triton_kernel(OPERATORS[name]).fallback else "triton")
    gate_up = torch.randn(5, 64, device=DEVICE)
    assert torch.allclose(ops.swiglu(gate_up), OPERATORS["swiglu"].reference(gate_up), atol=1e-5)

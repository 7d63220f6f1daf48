"""Ascend's own operators are called as Ascend documents them, and used only if they are there and right.

No card is at hand: the device is a stand-in called `npu`, and `torch_npu` a module whose functions have the documented
signatures and refuse what the documentation does not allow (see `tests/stand_in_torch_npu.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from liaoyuan.ops.operator import OPERATORS

TESTS = Path(__file__).parents[1]
USED_BY = {
    "npu_rms_norm": {"rms_norm", "split_rotary"},
    "npu_rms_norm_backward": {"rms_norm", "add_rms_norm", "split_rotary"},
    "npu_add_rms_norm": {"add_rms_norm"},
    "npu_rotary_mul": {"split_rotary"},
    "npu_fusion_attention": {"attention"},
    "npu_fusion_attention_grad": {"attention"},
    "npu_grouped_matmul": {"grouped_linear"},
    "npu_moe_gating_top_k": {"route"},
    "npu_moe_init_routing_v2": {"permute_rows"},
    "npu_moe_finalize_routing": {"permute_rows"},
    "npu_weight_quant_batchmatmul": {"quantised_linear"},
}


@pytest.fixture(scope="module")
def found() -> dict:
    """What happened on the device, in a process of its own."""
    script = TESTS / "stand_in_operators.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_torch_npu_the_reference_computes_and_says_why(found):
    for kernel, reason in found["without"].values():
        assert kernel == "reference" and "torch_npu is not installed" in reason and "pip install torch_npu" in reason
    assert found["loaded_without"] == []


def test_a_torch_npu_that_cannot_be_imported_costs_speed_alone(found):
    for kernel, reason in found["broken"].values():
        assert kernel == "reference" and "torch_npu cannot be imported (libhccl.so" in reason


def test_tensors_with_gaps_and_empty_ones_are_taken(found):
    assert set(found["edges"]) == set(found["names"])
    for name, differences in found["edges"].items():
        assert max(differences) < (2e-2 if name == "quantised_linear" else 2e-5), name
    assert found["none"] == dict.fromkeys(found["names"], True)


@pytest.mark.parametrize("name", ["attention", "grouped_linear", "rms_norm", "add_rms_norm", "permute_rows", "route"])
def test_they_are_tried_before_triton_where_they_take_as_few_passes(name):
    names = [kernel.name for kernel in OPERATORS[name].kernels if "npu" in kernel.devices]
    assert names == ["npu", "triton"]


def test_with_torch_npu_every_operator_that_has_one_uses_the_vendor_s(found):
    assert set(found["names"]) == set().union(*USED_BY.values())
    assert found["with"] == {name: ["npu", "passed its self-test"] for name in found["names"]}


@pytest.mark.parametrize(("model", "tolerance"), [("dense", 1e-5), ("experts", 1e-5), ("bf16", 2e-2)])
def test_training_with_the_vendor_s_operators_gives_the_losses_of_the_cpu(found, model, tolerance):
    assert found[model]["npu"] == pytest.approx(found[model]["cpu"], abs=tolerance)


def test_training_calls_them_forward_and_backward(found):
    training = set(USED_BY) - {"npu_weight_quant_batchmatmul"}  # routers of these models score as the vendor's does
    assert set(found["called_in_training"]) == training


@pytest.mark.parametrize("function", USED_BY)
def test_a_vendor_s_operator_that_is_off_is_refused(found, function):
    assert set(found["refused"][function]) == USED_BY[function]


def test_what_torch_npu_offers_is_what_is_called(found):
    assert set(found["refused"]) == set(USED_BY)


def test_nothing_of_ascend_is_imported_elsewhere(tmp_path):
    script = (
        "import sys, liaoyuan.ops as ops; ops.status('cpu');"
        "print([name for name in sys.modules if 'ascend' in name or name == 'torch_npu'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]

"""`device.py` holds: nothing else knows the devices' names, so a device that torch learns of later just works."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liaoyuan
from liaoyuan import device
from liaoyuan.device import Device, cpu_features, list_devices, measure_gemm_rate, measure_memory_rate, select_device
from liaoyuan.errors import LiaoyuanError

HERE = Path(__file__).parent
SOURCE = Path(liaoyuan.__file__).parent
DEVICE_MODULES = r"torch\.(cuda|npu|xpu|mps|cpu|hpu)\b|\.cuda\(|\.npu\(|is_cuda"


@pytest.fixture(scope="module")
def stand_in() -> dict:
    """What the CPU and the stand-in device computed, from a process of its own."""
    done = subprocess.run([sys.executable, HERE / "stand_in_steps.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_device_that_torch_learns_of_later_is_found(stand_in):
    assert stand_in["name"] == stand_in["expected_name"]
    assert stand_in["listed"][0].startswith(stand_in["expected_name"])
    assert stand_in["operators_on_device"] > 30, "the work ran on the device, not beside it"


@pytest.mark.parametrize(("model", "tolerance"), [("dense", 1e-5), ("experts", 1e-5), ("bf16", 2e-2)])
def test_training_steps_on_a_stand_in_device_give_the_losses_of_the_cpu(stand_in, model, tolerance):
    """Forward, backward and AdamW: the third loss has gone through two updates."""
    assert stand_in[model]["device"] == pytest.approx(stand_in[model]["cpu"], abs=tolerance)
    assert stand_in[model]["cpu"][2] < stand_in[model]["cpu"][0]


def test_the_engine_on_a_stand_in_device_writes_what_it_writes_on_the_cpu(stand_in):
    assert stand_in["generated"]["device"] == stand_in["generated"]["cpu"]


def test_only_device_py_asks_a_kind_of_device_by_name():
    """Kernels for one kind of device live in `ops/`; all else asks the `Device`."""
    found = [
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        if path.name != "device.py" and "ops" not in path.relative_to(SOURCE).parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(DEVICE_MODULES, line.split("#")[0])
    ]
    assert found == []


def test_the_cpu_is_always_there():
    assert select_device("cpu") == Device("cpu")
    assert select_device("cpu").torch == torch.device("cpu")
    assert list_devices()[-1].startswith("cpu: ")
    assert select_device("cpu").peak_memory() > 2**20
    select_device("cpu").synchronize()


@pytest.mark.parametrize("name", ["cuad", "npu:7", "cpu:0", "", "cuda:"])
def test_an_absent_device_is_refused_with_what_there_is(name):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(LiaoyuanError, match=r"There is no device '.*' here; torch offers cpu, auto"):
        select_device(name)


def test_rates_and_features_are_measured():
    assert measure_gemm_rate(torch.float32, seconds=0.05) > 1e8
    assert measure_memory_rate(megabytes=4, seconds=0.02) > 1e7
    assert isinstance(cpu_features(), list)


def test_a_product_that_would_take_long_is_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "_best_time", lambda work, place, seconds: asked.append(seconds) or 10.0)
    first = device.GEMM_SHAPES[0]
    assert device.measure_gemm_rate(torch.float32, 0.1) == 2 * first[0] * first[1] * first[2] / 10.0
    assert len(asked) == 1  # the first told that every larger one is hopeless

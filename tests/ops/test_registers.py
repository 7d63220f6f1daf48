"""The kernels are right on machines whose registers are others than this one's: AVX2, SSE, and AMX by emulation."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import slow_if

build = importlib.import_module("liaoyuan.ops.build")

CHECK = """
import sys
import torch
from liaoyuan import ops
sys.modules["liaoyuan.ops.kernels"].find_library = lambda: sys.argv[1]
wrong = [f"{row.operator}: {row.reason}" for row in ops.status() if row.kernel != "native"]

def results(x, weight, grad):
    x = x.clone().requires_grad_()
    found = [ops.linear(x, weight), ops.grouped_linear(x, weight[None], torch.tensor([len(x)]))]
    return [*found, torch.autograd.grad(found[0], x, grad)[0]]

for dtype in (torch.float32, torch.bfloat16):
    for width in (64, 77, 1100):  # whole words and tiles, and neither
        x, weight, grad = (torch.randn(shape, dtype=dtype) for shape in ((150, width), (70, width), (150, 70)))
        whole = results(x, weight, grad)
        for first, last in ((0, 1), (3, 11), (7, 24), (40, 104), (1, 150)):
            part = results(x[first:last], weight, grad[first:last])
            if not all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True)):
                wrong.append(f"rows {first} to {last} of width {width} in {dtype} have other bits alone")
WAYS = (("int8", None), ("int8", 64), ("fp8", None), ("int4", 32), ("int4", 128, False))
for dtype in (torch.float32, torch.bfloat16):
    for way in WAYS:
        x, weight = torch.randn(300, 300, dtype=dtype), ops.quantise(torch.randn(70, 300), *way)
        whole = ops.quantised_linear(x, weight)
        for first, last in ((0, 1), (3, 5), (7, 11), (40, 45), (50, 83), (1, 300)):
            if not torch.equal(ops.quantised_linear(x[first:last], weight), whole[first:last]):
                wrong.append(f"rows {first} to {last} of {way} in {dtype} have other bits alone")
sys.exit("; ".join(wrong) or None)
"""

MACHINES = {
    "AVX2": ("-march=x86-64-v3",),
    "SSE": ("-march=x86-64",),
    "AMX emulated": ("-march=native", "-DEMULATED_AMX"),
}
HERE = "AVX512" if "avx512f" in build.processor() else "AVX2"  # what all other tests of the kernels have run on

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")


@pytest.mark.parametrize("machine", [slow_if(name in (HERE, "SSE"), name) for name in MACHINES])
def test_every_kernel_passes_its_self_test_and_rows_keep_their_bits(machine: str, tmp_path: Path) -> None:
    commands = [build.kernel_command(source, MACHINES[machine]) for source in build.kernel_sources()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(
            pool.map(lambda command: build.object_of(command, tmp_path), [build.bindings_command(), *commands])
        )
    library = build.link(objects, tmp_path / "kernels.so")
    where = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", CHECK, str(library)], env=where, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]

"""The kernels are right on machines whose registers are narrower than this one's (AVX2, SSE)."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import sys
from liaoyuan import ops
build = sys.modules["liaoyuan.ops.build"]
build.KERNEL_FLAGS = tuple(sys.argv[1] if flag == "-march=native" else flag for flag in build.KERNEL_FLAGS)
wrong = [f"{row.operator}: {row.reason}" for row in ops.status() if row.kernel != "native"]
sys.exit("; ".join(wrong) or None)
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_every_kernel_passes_its_self_test(machine: str, tmp_path: Path) -> None:
    where = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", CHECK, f"-march={machine}"], env=where, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]

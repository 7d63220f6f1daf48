"""The settings that pay are in force in every process, those of `launch` too, and `doctor` shows them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from liaoyuan.cli.worker import worker_command

FRESH_PAGES = """
import resource
from liaoyuan.cli.process import tune_process
tune_process()
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_large_tensor_is_given_pages_that_were_freed() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    found = subprocess.run([sys.executable, "-c", FRESH_PAGES], env=environment, capture_output=True, text=True)
    first, later = map(int, found.stdout.split())
    assert later < 20 < first, found


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_process_of_the_launcher_has_them_and_doctor_shows_them(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    command = worker_command(tmp_path, ["doctor", "--json"])
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    process = json.loads(found.stdout)["process"]
    assert process["allocator"] == "glibc, freed memory is kept"
    assert process["huge_pages"] is True
    assert process["threads"] == 1

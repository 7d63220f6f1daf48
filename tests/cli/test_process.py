"""The settings that pay are in force in every process, those of `launch` too, and `doctor` shows them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from liaoyuan.cli.worker import worker_command

KEPT = """
from liaoyuan.cli.process import tune_process
tune_process()
import torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
x = torch.ones(1 << 24)
held = resident() - before
del x
print(held, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_memory_that_was_freed_stays_with_the_process() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, timeout=300)
    held, later = map(int, found.stdout.split())
    assert held >= 2**26 and later >= 2**26, found


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


def test_imports_look_for_no_garbage_and_what_comes_after_them_does() -> None:
    script = """
import gc
from liaoyuan.cli.process import importing
before = gc.get_stats()[0]["collections"]
with importing():
    kept = [[] for _ in range(100_000)]
    during = gc.get_stats()[0]["collections"]
again = [[] for _ in range(100_000)]
looked, frozen = gc.get_stats()[0]["collections"] > during, gc.get_freeze_count() > 100_000
try:
    with importing():
        raise ImportError
except ImportError:
    print(during - before, looked, frozen, gc.isenabled())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["0", "True", "True", "True"], found


@pytest.mark.parametrize(("given", "code"), [("", 0), ("3", 3), ("'words'", 1)])
def test_a_process_that_ends_at_once_has_done_what_was_left_to_do(given: str, code: int) -> None:
    script = f"""
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from liaoyuan.cli.process import ending_at_once
atexit.register(lambda: print("registered"))
def work():
    ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("pooled", end=" ")))
    threading.Thread(target=lambda: (time.sleep(0.2), print("threaded", end=" "))).start()
    sys.exit({given})
ending_at_once(work)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["pooled", "threaded", "registered"] and found.returncode == code
    assert found.stderr.strip() == ("words" if "words" in given else "")

"""A small soak; `make soak` runs the large one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("options", [[], ["--no-guesses"]])
def test_a_server_under_everything_at_once_keeps_its_promises(options: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "soak.json"
    command = [sys.executable, ROOT / "benchmarks" / "engine_soak.py", "--requests", "180", "--clients", "16", *options]
    done = subprocess.run([*command, "--json", figures], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(figures.read_text())["counts"]
    assert counts["answers compared"] > 60
    assert bool(counts["guessed tokens that were right"]) is not bool(options)
    assert counts["prompt tokens found in the prefix cache"] > 100

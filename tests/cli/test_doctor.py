"""`doctor` tells the truth about this machine, to people on one screen and to machines as JSON."""

import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from liaoyuan.cli import doctor as room
from liaoyuan.cli.process import ProcessSettings

SETTINGS = ProcessSettings("glibc, freed memory is kept", True, 1, "OMP_NUM_THREADS")


@pytest.fixture
def app(monkeypatch) -> typer.Typer:
    """The verb alone, measuring for an instant."""
    monkeypatch.setattr(room, "SECONDS", 0.01)
    app = typer.Typer()
    app.command()(room.doctor)
    return app


def test_json_holds_every_promised_part(app):
    found = json.loads(CliRunner().invoke(app, ["--json"], obj=SETTINGS).stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][-1].startswith("cpu: ")
    assert found["process"]["threads"] == torch.get_num_threads()
    assert found["process"]["threads_from"] == "OMP_NUM_THREADS"
    assert all(row[name] > 0 for row in found["rates"] for name in ("bfloat16", "float32", "memory"))
    assert {"kernels", "missing", "cache", "cpu_features", "memory"} <= found.keys()
    assert found["jail"].startswith(("works: ", "none: the jail lacks its part "))


def test_the_page_for_people_fits_a_screen(app):
    result = CliRunner().invoke(app, [], obj=SETTINGS)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 45
    assert "chosen by OMP_NUM_THREADS" in result.stdout
    assert re.search(r"[1-9]\d*\.\d\d TFLOP/s|[1-9]\d* GFLOP/s", result.stdout)


def test_a_missing_compiler_is_named_with_what_adds_it(monkeypatch):
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    parts = {part: add for part, _, add in room.missing()}
    assert parts["C++ compiler"] == "sudo apt install g++"
    assert "Chromium" in parts


def test_measuring_leaves_the_number_of_threads_alone(monkeypatch):
    monkeypatch.setattr(room, "SECONDS", 0.01)
    before = torch.get_num_threads()
    room.rates()
    assert torch.get_num_threads() == before

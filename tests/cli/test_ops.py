"""`liaoyuan ops`: the verb's exit status, its words for people and for machines, and its mistakes."""

import json
import re
import signal

import pytest
from typer.testing import CliRunner

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.ops import app
from liaoyuan.compute import profile as room
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from tests.conftest import randomised
from tests.parallel.layouts import COMMON
from tests.verbs import Verb

WORDS = COMMON | {"model_type": "qwen3", "num_hidden_layers": 2}
SHORT = ("--tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dense") / "model"
    save_model(randomised(config_from_dict(WORDS), 0), path, None)
    return str(path)


@pytest.fixture(autouse=True)
def _rates_in_an_instant(monkeypatch):
    monkeypatch.setattr(room, "RATE_SECONDS", 0.01)


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_two_runs_that_agree_end_with_status_0(folder):
    found = run("compare", folder, *SHORT)
    assert found.exit_code == 0 and re.search(r"All \d+ operators that both call gave the same bits", found.stdout)
    assert "differences: none" in found.stdout


def test_a_difference_beyond_tolerance_is_named_and_gives_status_1(folder):
    found = run("compare", folder, "--dtype", "float32,bfloat16", "--tolerance", "1e-6", *SHORT)
    assert found.exit_code == 1
    assert "The first to differ beyond tolerance is aten.embedding of embed_tokens, forward" in found.stdout
    assert "of the largest element" in found.stdout and "*" in found.stdout


def test_compare_tells_machines_all(folder):
    found = run("compare", folder, "--dtype", "float32,bfloat16", "--json", *SHORT)
    values = json.loads(found.stdout)
    assert values.keys() == {"differs", "tolerance", "losses", "first", "parted", "operators", "gradients"}
    assert values["differs"] is False and values["first"] is None and found.exit_code == 0
    row = values["operators"][5]
    assert row.keys() == {"phase", "module", "operator", "output", "is_beyond", "is_own", "only", "difference", "alone"}
    assert row["difference"].keys() == {"largest", "relative", "first", "second", "where", "reason"}
    assert len(values["gradients"]) == len(list(randomised(config_from_dict(WORDS), 0).parameters()))


def test_all_shows_every_operator(folder):
    few, every = run("compare", folder, *SHORT), run("compare", folder, "--all", *SHORT)
    assert len(every.stdout.splitlines()) > len(few.stdout.splitlines()) + 40


def test_a_layout_is_compared_by_its_gradients(folder):
    found = run("compare", folder, "--layout", "tp=2,cp.ring=2", *SHORT)
    assert found.exit_code == 0 and "The gradients agree" in found.stdout


def test_profile_prints_parts_that_add_up(folder):
    found = run("profile", folder, "--steps", "1", *SHORT)
    assert found.exit_code == 0
    shares = dict(re.findall(r"(?m)^(\S.*?)\s{2,}(?:[\d,]+ +)?[\d.]+ +([\d.]+)%", found.stdout))
    assert shares.pop("the step") == "100.0"
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=1.5)  # each is rounded
    assert {"between operators", "measuring", "linear_backward"} <= shares.keys()
    assert "A step without a clock in it" in found.stdout


def test_profile_writes_a_page_and_its_numbers(folder, tmp_path):
    found = run("profile", folder, "--steps", "1", "--prefill", "--json", "--out", str(tmp_path), "--tokens", "32")
    assert json.loads((tmp_path / "profile.json").read_text()) == json.loads(found.stdout)
    assert (tmp_path / "profile.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.html", "profile.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("compare", "nowhere"), "nowhere does not exist."),
        (("profile", "nowhere"), "nowhere does not exist."),
        (("compare", "FOLDER", "--dtype", "a,b,c"), "--dtype a,b,c must be one value for both"),
        (("compare", "FOLDER", "--device", "gpu"), "There is no device 'gpu' here"),
        (("compare", "FOLDER", "--layout", "tp=3"), "The layout tp 3 does not fit"),
        (("compare", "FOLDER", "--layout", "tq=2"), "Unknown key 'tq' in the command line"),
        (("compare", "FOLDER", "FOLDER", "--layout", "tp=2"), "--layout compares one process with simulated ones"),
        (("compare", "FOLDER", "--text", "README.md"), "needs a model with its tokenizer"),
        (("profile", "FOLDER", "--prefill", "--decode"), "choose one"),
        (("profile", "FOLDER", "--set", "train.steps=3"), "--set is for run files and runs"),
        (("profile", "nowhere.toml"), "nowhere.toml does not exist."),
    ],
)
def test_a_mistake_is_one_sentence(folder, arguments, told):
    found = run(*(folder if word == "FOLDER" else word for word in arguments))
    assert isinstance(found.exception, LiaoyuanError) and told in str(found.exception)
    assert found.exception.exit_code == 2


@pytest.mark.parametrize("verb", [("compare", "--tokens", "512"), ("profile", "--steps", "100000")])
def test_ctrl_c_leaves_no_trace(folder, tmp_path, verb):
    """Interrupted while it works: its own exit status, no traceback, no file."""
    out = ["--out", tmp_path / "out"] if verb[0] == "profile" else []
    with Verb("ops", verb[0], folder, *verb[1:], *out, cwd=tmp_path) as started:
        assert started.stderr
        started.stderr.readline()  # the first line of progress
        started.send_signal(signal.SIGINT)
        told = started.stderr.read()
    assert started.returncode == 130, told
    assert "Traceback" not in told and list(tmp_path.iterdir()) == []


def test_build_compiles_an_accelerator_s_kernels_where_there_is_one(monkeypatch):
    monkeypatch.setattr("liaoyuan.device.find_accelerator", lambda: "cuda")
    monkeypatch.setattr("liaoyuan.ops.compile_ahead", lambda device, report: [device])
    monkeypatch.setattr("liaoyuan.ops.build", lambda report: "here")
    assert "1 operators have a kernel for cuda" in run("build").output
    monkeypatch.setattr("liaoyuan.device.find_accelerator", lambda: None)
    assert "cuda" not in (told := run("build").output) and "The CPU kernels are in here." in told

"""Exact mode without compiled kernels: PyTorch's own operators are not exact, in tiles they are."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.cli.main import app
from liaoyuan.inference import QUICK, Engine, EngineConfig, Request, SamplingParams, prove
from liaoyuan.inference.exactness.paths import Extent
from liaoyuan.inference.exactness.proof import find_proof
from liaoyuan.models.quantised import Quantisation, quantise_model
from liaoyuan.ops import choice, tiled
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.rundir import silent
from tests.conftest import ROOT, slow_if
from tests.inference.test_exact_mode import DTYPES, FEATURES, model_of, of_training

FEW = replace(QUICK, lengths=(1, 33, 36), batches=(3,))  # less than a tile of rows, and more
STORIES = next((p for p in (ROOT, *ROOT.parents) if (p / "shared/models/stories260k").exists()), None)


def one_dtype_each(features: Iterable[str]) -> list[Any]:
    """Return each feature in each dtype, of which every second is slow."""
    rows = [(feature, dtype) for feature in features for dtype in DTYPES]
    return [slow_if(number % 4 in (1, 2), *row) for number, row in enumerate(rows)]


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    """Every operator is computed by its reference, as where no compiler is."""
    ops.configure(dict.fromkeys(OPERATORS, "reference"))
    yield
    ops.seek_exactness(False)
    ops.configure({})


@pytest.mark.parametrize(("feature", "dtype"), one_dtype_each(FEATURES))
def test_every_path_gives_the_bits_of_training_in_tiles(feature: str, dtype: str) -> None:
    ops.seek_exactness()
    proof = prove(model_of(feature, dtype), FEW)
    assert [result for result in proof.results if not result.equal] == []
    assert proof.exact and proof.verdict.startswith("Exact: ")
    assert len(proof.results) == 11 and set(proof.kernels.values()) == {"tiled"}


@pytest.mark.parametrize(("feature", "dtype"), one_dtype_each(["dense", "experts"]))
def test_and_not_without(feature: str, dtype: str) -> None:
    proof = prove(model_of(feature, dtype), FEW)
    assert not proof.exact and set(proof.kernels.values()) == {"reference"}


@pytest.mark.parametrize(("feature", "dtype"), [("experts", "bfloat16"), slow_if(True, "window and sinks", "float32")])
def test_two_threads_give_the_bits_of_one(feature: str, dtype: str) -> None:
    ops.seek_exactness()
    few = Extent(lengths=(1, 40), tokens=5, batches=(2,), chunks=(7,), threads=(1, 2), stride=1)
    proof = prove(model_of(feature, dtype), few)
    assert proof.exact and {result.threads for result in proof.results} == {1, 2}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("kind", ["int8", slow_if(True, "int4")])
def test_weights_of_few_bits_are_exact_too(kind: str) -> None:
    ops.seek_exactness()
    proof = prove(quantise_model(model_of("experts", "bfloat16"), Quantisation(kind)), FEW)
    assert proof.exact and proof.kernels["quantised_linear"] == "tiled"


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("linear", "linear of layers.0.self_attn"),
        ("attention", "attention of layers.0.self_attn"),
        ("grouped_linear", "grouped_linear of layers.1.mlp"),
        ("loss_head", "the softmax of the head"),
    ],
)
def test_one_operator_without_tiles_and_nothing_is_claimed(name, blamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, name, OPERATORS[name].reference)
    ops.seek_exactness()
    proof = prove(model_of("experts"), FEW)
    if proof.exact:
        pytest.skip("PyTorch's own operators on this machine give these few rows the same bits")
    assert proof.operator.startswith(blamed), proof.verdict


def test_attention_that_begins_its_blocks_elsewhere_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 keys that are counted from the first one that a tile sees, not from the first of the sequence."""
    monkeypatch.setattr(tiled, "KEYS", 16)
    ops.seek_exactness()
    assert prove(model_of("window and sinks"), FEW).exact
    attended = tiled._attended

    def from_the_window(query, key, value, scale, window, sinks):
        unseen = max(len(key) - len(query) - (window or len(key)) + 1, 0)
        return attended(query, key[unseen:], value[unseen:], scale, window, sinks)

    monkeypatch.setattr(tiled, "_attended", from_the_window)
    choice.forget()
    proof = prove(model_of("window and sinks"), FEW)
    assert not proof.exact and proof.operator.startswith("attention of layers.0.self_attn"), proof.verdict


def test_an_engine_that_must_be_exact_takes_the_fallback_and_keeps_its_proof(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = model_of("dense")
    assert Engine(model, EngineConfig()).statistics()["exact"] == "not proven"
    assert {row.kernel for row in ops.status()} == {"reference"}
    engine = Engine(model, EngineConfig(exact=True))
    assert engine.statistics()["exact"] is True
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove", lambda *_: pytest.fail("it was proven again"))
    assert find_proof(model).exact
    asked = [Request(n, tuple(range(n, 3 * n + 1)), SamplingParams(max_tokens=9, prompt_logprobs=0)) for n in range(9)]
    for request, one in zip(asked, engine.generate(asked), strict=True):
        expected = of_training(model, request.prompt + tuple(one.tokens))
        assert [*(one.prompt.logprobs if one.prompt else []), *one.logprobs] == expected


def test_doctor_proves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model_of("dense"), tmp_path / "model", None)
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove.__defaults__", (FEW, silent, None))
    told = CliRunner().invoke(app, ["doctor", "--exact", str(tmp_path / "model")])
    assert told.exit_code == 0 and "computed by: tiled." in told.stdout and "Exact: all" in told.stdout


def test_a_trained_model_is_exact_over_several_blocks_of_keys() -> None:
    if STORIES is None:
        pytest.skip("needs shared/models/stories260k")
    ops.seek_exactness()
    longer = Extent(lengths=(33, 140), tokens=5, batches=(2,), chunks=(33,))
    proof = prove(load_model(STORIES / "shared/models/stories260k").eval(), longer)
    assert [result for result in proof.results if result.unequal] == []
    assert sum(result.compared for result in proof.results) > 1000


SCRIPT = """
import torch
from liaoyuan import ops
from liaoyuan.inference import prove
from tests.inference.test_exact_fallback import FEW
from tests.inference.test_exact_mode import model_of
for exact in (False, True):
    ops.seek_exactness(exact)
    proof = prove(model_of("dense"), FEW)
    print(sorted(set(proof.kernels.values())), proof.verdict)
print(next(row.reason for row in ops.status() if row.operator == "linear"))
"""


def test_where_no_compiler_is(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]
    stock, tiles, reason = found.stdout.splitlines()
    assert stock.startswith("['reference'] Not ") and tiles.startswith("['tiled'] Exact: all ")
    assert reason.startswith("exactness was asked for; There is no C++ compiler")

"""`liaoyuan plan` of run files of `tune`, and of serving."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.main import app
from liaoyuan.errors import LiaoyuanError

SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def call(*words: object) -> Any:
    result = CliRunner().invoke(app, ["plan", *map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(f'model = "{folder / "model"}"\n{text}')
    return path


def test_a_run_file_of_fine_tuning(folder: Path) -> None:
    path = run_file(folder, 'data = "none.jsonl"\nmethod = "lora"\n[train]\nbatch_tokens = 2048\n')
    found = call(path, "--records", 400, "--mean-tokens", 100)
    assert found["steps"] == 61  # 400 records of 100 tokens, three times, with 3% of padding
    pairs = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    assert found["trained"] == 2 * 16 * sum(map(sum, pairs))  # layers, rank
    assert found["hours"]["low"] < found["hours"]["median"] < found["hours"]["high"]
    again = call("tune", path, "--verb", "dpo", "--records", 400, "--set", "train.steps=7")
    assert again["steps"] == 7 and again["flops"] > found["flops"]  # with the reference of every batch
    with pytest.raises(LiaoyuanError, match="--records and --mean-tokens"):
        call(path)


def test_a_run_file_of_reinforcement(folder: Path) -> None:
    path = run_file(folder, 'task = "addition"\n[rl]\nproblems = 4\nsteps = 10\n')
    ways = call(path, "--processes", 2)
    assert [one["split"]["rollout"] for one in ways].count(1) == 1
    path = run_file(folder, "[rl]\nproblms = 4\n")
    with pytest.raises(LiaoyuanError, match="did you mean 'problems'"):
        call(path)
    with pytest.raises(LiaoyuanError, match="there is no 'dpq', did you mean 'dpo'"):
        call("tune", path, "--verb", "dpq")


def test_a_trace_of_requests(folder: Path) -> None:
    trace = folder / "trace.jsonl"
    rows = [{"arrival": n / 10, "prompt_tokens": 20 + n, "output_tokens": 10, "prefix": "a"} for n in range(20)]
    trace.write_text("\n".join(json.dumps(row | {"prefix_tokens": 16}) for row in rows))
    found = call("serve", folder / "model", "--trace", trace, "--processes", 2, "--apart")["ways"]
    assert {(one["way"]["replicas"], one["way"]["tp"], one["way"]["prefill"]) for one in found} == {
        (2, 1, 0),
        (1, 2, 0),
        (2, 1, 1),
    }
    assert found[0]["fast"]["whole"]["mean"] < found[0]["median"]["whole"]["mean"] < found[0]["slow"]["whole"]["mean"]
    assert all(one["median"]["generated"] == 200 for one in found)
    assert found[0]["median"]["cached_tokens"] > 0
    trace.write_text('{"arrival": 0, "prompt_tokens": 4, "output_tokens": 1, "tokens": 3}')
    with pytest.raises(LiaoyuanError, match="line 1: there is no key 'tokens'"):
        call("serve", folder / "model", "--trace", trace)
    with pytest.raises(LiaoyuanError, match="this model has no experts"):
        call("serve", folder / "model", "--processes", 2, "--routers", _routers(folder))


def _routers(folder: Path) -> Path:
    path = folder / "routers.jsonl"
    path.write_text('{"counts": [[1, 2], [3, 4]]}\n{"counts": [[1, 2], [3, 4]]}\n')
    return path


def test_rates_are_measured_and_used(folder: Path) -> None:
    from liaoyuan.checkpoint import save_model
    from liaoyuan.data import train_tokenizer
    from liaoyuan.models import Decoder, initialise, read_config

    train_tokenizer(["a few words"], 270).save(folder / "tokenizer")
    model = initialise(Decoder(read_config(folder / "model")), seed=0)
    save_model(model, folder / "whole", folder / "tokenizer")
    out = folder / "rates.json"
    measured = call("serve-rates", folder / "whole", "--rounds", 1, "--out", out)
    assert json.loads(out.read_text()) == measured
    own = measured["step"]["median"] + measured["sequence"]["median"]
    assert own < 1
    assert own > 1e-6 or measured["products"]["median"] > 1  # one round cannot always tell what takes the time
    found = call("serve", folder / "whole", "--cluster", "cpu", "--rates", out, "--count", 5, "--output", 5, "--tp", 1)
    assert found["ways"][0]["median"]["generated"] >= 5

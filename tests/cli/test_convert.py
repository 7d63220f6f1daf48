"""`liaoyuan convert` as a user meets it: what it writes, what it refuses, and what a kill leaves."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.checkpoint.training_state import save_state
from liaoyuan.cli.main import app
from liaoyuan.data import Corpus, CorpusConfig, prepare_corpus
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, config_from_dict
from liaoyuan.rundir import read_metrics
from liaoyuan.training import TrainConfig, make_optimiser
from tests.parallel.layouts import MODELS, model_of
from tests.verbs import Verb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(*arguments: object) -> str:
    """Run the verb and return what it prints; raises the LiaoyuanError that the command line would print."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def folder_of(kind: str, dtype: str, folder: Path) -> Decoder:
    """Write and return a model with random weights."""
    model = Decoder(replace(config_from_dict(MODELS[kind]), dtype=dtype))
    model.load_state_dict(model_of(kind, torch.float32).state_dict())
    save_model(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_every_dtype_to_every_other(kind: str, source: str, target: str, tmp_path: Path) -> None:
    model = folder_of(kind, source, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "--dtype", target, "--max-shard", "20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert (tmp_path / "b" / "tokenizer.json").exists()
    again = load_model(tmp_path / "b")
    assert again.config == replace(model.config, dtype=target)
    for name, value in model.state_dict().items():
        kept = value if "correction_bias" in name else value.to(DTYPES[target])
        assert torch.equal(again.state_dict()[name], kept), name


def test_the_own_words_of_config_json_are_kept(tmp_path: Path) -> None:
    folder_of("dense", "bfloat16", tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    words = json.loads(path.read_text()) | {"eos_token_id": [1, 2], "rope_theta": 5000.0, "made_by": "somebody"}
    path.write_text(json.dumps(words))
    convert(tmp_path / "a", tmp_path / "b", "--dtype", "float32")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == words | {"dtype": "float32"}


def saved_state(folder: Path, dtype: str, steps: tuple[int, ...] = (3, 7)) -> Decoder:
    """Save states whose fp32 masters are not what their rounded weights are; return the model at the last step."""
    model = Decoder(replace(config_from_dict(MODELS["latent"]), dtype=dtype))
    model.load_state_dict(model_of("latent", torch.float32).state_dict())
    optimiser = make_optimiser(model, TrainConfig(steps=9))
    for step in steps:
        for weight in optimiser.weights:
            weight.master.mul_(1.0001)
            weight.part.copy_(weight.master)
        save_state(folder, step, model, optimiser, {})
    model.masters = {weight.name: weight.master.clone() for weight in optimiser.weights}
    return model


@pytest.mark.parametrize("name", ["", "state", "state/step-000007"])
def test_a_run_becomes_a_model_folder(name: str, tmp_path: Path) -> None:
    model = saved_state(tmp_path / "run" / "state", "bfloat16")
    said = json.loads(convert(tmp_path / "run" / name, tmp_path / "b", "--json"))
    assert said["dtype"] == "bfloat16" and said["shards"] == 1 and "step 7" in said["source"]
    again = load_model(tmp_path / "b").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


def test_a_wider_dtype_gets_the_fp32_masters(tmp_path: Path) -> None:
    model = saved_state(tmp_path / "state", "bfloat16")
    convert(tmp_path / "state", tmp_path / "b", "--dtype", "float32")
    again = load_model(tmp_path / "b").state_dict()
    for key, value in model.masters.items():
        assert torch.equal(again[key], value), key


def test_an_older_step_is_there_on_demand(tmp_path: Path) -> None:
    saved_state(tmp_path / "state", "float32", steps=(3,))
    convert(tmp_path / "state", tmp_path / "three")
    saved_state(tmp_path / "state", "float32", steps=(3, 7))
    convert(tmp_path / "state", tmp_path / "b", "--step", "3")
    three, b = (load_model(tmp_path / name).state_dict() for name in ("three", "b"))
    assert all(torch.equal(three[key], b[key]) for key in b)
    with pytest.raises(LiaoyuanError, match="no checkpoint of step 4; it has those of 3, 7"):
        convert(tmp_path / "state", tmp_path / "c", "--step", "4")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for index in range(30):
        lines = [f"def f{index}_{line}(x): return x + {index * line}" for line in range(30)]
        (folder / "text" / f"module{index}.py").write_text("\n".join(lines))
    return prepare_corpus(CorpusConfig(text=folder / "text", vocab_size=300), folder / "corpus")


RUN_FILE = """
corpus = "{corpus}"
sequence_length = 64
held_out_tokens = 256
device = "cpu"
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
dtype = "{dtype}"
[train]
steps = 6
batch_tokens = 256
warmup_steps = 2
seed = {seed}
optimiser = "{optimiser}"
"""


@pytest.mark.parametrize(("dtype", "optimiser"), [("bfloat16", "adamw"), ("float32", "muon")])
def test_train_goes_on_from_a_folder_as_if_it_had_begun_with_it(
    dtype: str, optimiser: str, corpus: Corpus, tmp_path: Path
) -> None:
    run_file, weights = tmp_path / "run.toml", tmp_path / "first"
    run_file.write_text(RUN_FILE.format(corpus=corpus.folder, dtype=dtype, seed=5, optimiser=optimiser))
    train = ["train", str(run_file), "--out"]
    assert CliRunner().invoke(app, [*train, str(weights)]).exit_code == 0
    model = weights / "model"
    convert(model, tmp_path / "converted", "--to", "state", "--run-file", run_file)
    CliRunner().invoke(app, [*train, str(tmp_path / "converted")], catch_exceptions=False)
    begun = [*train, str(tmp_path / "begun"), "--set", f"model.weights={model}"]
    CliRunner().invoke(app, begun, catch_exceptions=False)
    losses = {
        name: [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("first", "begun", "converted")
    }
    assert losses["converted"] == losses["begun"] != losses["first"]
    with pytest.raises(LiaoyuanError, match="already holds a run's checkpoints"):
        convert(model, tmp_path / "converted", "--to", "state", "--run-file", run_file)
    with pytest.raises(LiaoyuanError, match="asks for hidden_size = 64, but the weights have 32"):
        convert(model, tmp_path / "x", "--to", "state", "--run-file", run_file, "--set", "model.hidden_size=64")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def tear(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_the_shape(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))


def leave_a_pickle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def overflow(folder: Path) -> None:
    model = load_model(folder)
    with torch.no_grad():
        model.norm.weight[3] = 1e5
    save_model(model, folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_a_shard, "has no weights"),
        (tear, "truncated or corrupt"),
        (change_the_shape, "has shape"),
        (leave_a_pickle, "is a pickle, which is never opened"),
        (overflow, "float16 cannot hold"),
    ],
)
def test_a_source_that_is_wrong_is_refused_and_nothing_is_written(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder_of("dense", "float32", tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(LiaoyuanError, match=said):
        convert(tmp_path / "a", tmp_path / "b", "--dtype", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_torn_checkpoint_is_refused_and_others_are_named(tmp_path: Path) -> None:
    saved_state(tmp_path / "state", "float32")
    part = tmp_path / "state" / "step-000007" / "rank-0000.safetensors"
    raw = bytearray(part.read_bytes())
    for position in range(20_000, len(raw), 5_000):
        raw[position] ^= 1
    part.write_bytes(raw)
    with pytest.raises(LiaoyuanError, match=r"step-000007 is truncated or corrupt .* --step 3 is there too"):
        convert(tmp_path / "state", tmp_path / "b")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("state", ".lock")]


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    folder_of("dense", "float32", a)
    b.mkdir()
    convert(a, b)  # an empty one will do
    with pytest.raises(LiaoyuanError, match="exists and is not empty"):
        convert(a, b, "--dtype", "bfloat16")
    assert load_model(b).config.dtype == "float32"
    convert(a, b, "--dtype", "bfloat16", "--force")
    assert load_model(b).config.dtype == "bfloat16"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(LiaoyuanError, match="not what --force may replace"):
        convert(a, tmp_path / "notes", "--force")
    for target in (a, tmp_path):
        with pytest.raises(LiaoyuanError, match="The source lies in"):
            convert(a, target, "--force")
    with pytest.raises(LiaoyuanError, match="is a file"):
        convert(a, tmp_path / "notes" / "diary.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-shard", "5XB"], "must be a size such as 5GB"),
        (["--max-shard", "0"], "must be a size such as 5GB"),
        (["--step", "3"], "holds no checkpoints"),
        (["--tokenizer", "nowhere"], "there is no tokenizer.json"),
        (["--to", "state"], "needs --run-file"),
        (["--run-file", "x.toml"], "are for --to state"),
        (["--to", "state", "--dtype", "float32"], "the run file says dtype"),
    ],
)
def test_options_that_make_no_sense(options: list[str], said: str, tmp_path: Path) -> None:
    folder_of("dense", "float32", tmp_path / "a")
    with pytest.raises(LiaoyuanError, match=said):
        convert(tmp_path / "a", tmp_path / "b", *options)


def test_what_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "b")
    with pytest.raises(LiaoyuanError, match="neither a model folder"):
        convert(tmp_path, tmp_path / "b")
    (tmp_path / "c").write_text("")
    with pytest.raises(LiaoyuanError, match="is a file: name the folder"):
        convert(tmp_path / "c", tmp_path / "b")


STOPPED = """
import os, signal, sys
from liaoyuan.checkpoint.shards import ShardWriter
write, count, sign = ShardWriter.write, [0], int(sys.argv.pop())
def dying(self, name, tensor):
    write(self, name, tensor)
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), sign)
ShardWriter.write = dying
from liaoyuan.cli.main import main
main()
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stop_in_the_middle_leaves_nothing_that_looks_whole(sign: signal.Signals, tmp_path: Path) -> None:
    folder_of("dense", "float32", tmp_path / "a")
    out = tmp_path / "out"
    done = Verb("convert", tmp_path / "a", out / "b", int(sign), program=STOPPED)
    _, said = done.communicate(120)
    left = [path.name for path in out.iterdir()]
    if sign == signal.SIGKILL:
        assert done.returncode == -9
        assert len(left) == 1 and left[0].startswith(".part-")
    else:
        assert done.returncode == 130 and left == []
        assert said.endswith("liaoyuan: Stopped; nothing was written. The same command begins again.\n")
    convert(tmp_path / "a", out / "b")
    assert load_model(out / "b").config.dtype == "float32"

"""Pretraining from a corpus folder to a model folder, and the sizes chosen for it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan import ops
from liaoyuan.checkpoint import load_model
from liaoyuan.cli.main import app
from liaoyuan.config import load
from liaoyuan.data import Corpus, CorpusConfig, TokenBatches, Tokenizer, prepare_corpus
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import packed_context
from liaoyuan.rundir import read_metrics
from liaoyuan.training import TrainConfig
from liaoyuan.training.pretrain import PretrainConfig, ShapeConfig, held_out_loss, pretrain
from liaoyuan.training.sizing import LADDER, Rung, choose_size, predicted_loss

SHAPE = ShapeConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16
)
TRAIN = TrainConfig(steps=8, batch_tokens=256, warmup_steps=2, checkpoint_every=3, evaluate_every=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text"
    text.mkdir()
    for index in range(40):
        lines = [f"def f{index}_{line}(x): return x + {index * line}" for line in range(30)]
        (text / f"module{index}.py").write_text("\n".join(lines))
    return prepare_corpus(CorpusConfig(text=text, vocab_size=300), folder / "corpus")


@pytest.fixture
def config(corpus: Corpus) -> PretrainConfig:
    return PretrainConfig(
        corpus=corpus.folder, model=SHAPE, train=TRAIN, sequence_length=64, held_out_tokens=256, device="cpu"
    )


def test_the_result_is_a_model_folder_that_learned(config: PretrainConfig, corpus: Corpus, tmp_path: Path) -> None:
    result = pretrain(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert result.steps == len(rows) == 8 and len(held_out) == 2
    assert held_out[-1] < held_out[0] < 6.0
    model = load_model(tmp_path / "model")
    assert model.config.eos_token_id == corpus.tokenizer().eos_ids[0]
    assert held_out_loss(corpus, config)(model)["held_out_loss"] == pytest.approx(held_out[-1], rel=1e-6)
    assert Tokenizer.load(tmp_path / "model").vocab_size == model.config.vocab_size


def test_z_loss_lowers_the_log_sum_exp_and_held_out_loss_stays_plain(
    config: PretrainConfig, corpus: Corpus, tmp_path: Path
) -> None:
    settings = TRAIN.model_copy(update={"z_loss": 0.1, "label_smoothing": 0.05})
    pretrain(config.model_copy(update={"train": settings}), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < rows[-1]["penalty"] < rows[0]["penalty"]
    measured = held_out_loss(corpus, config)(load_model(tmp_path / "model"))
    assert measured["held_out_loss"] == pytest.approx(rows[-1]["held_out_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("z_loss=-1", "train.z_loss"),
        ("label_smoothing=1", "train.label_smoothing"),
        ("label_smoothing=a", "train.label"),
    ],
)
def test_a_penalty_out_of_range_is_refused_by_name(setting: str, said: str, config: PretrainConfig) -> None:
    values = ["corpus=x", "train.steps=1", f"train.{setting}"]
    with pytest.raises(LiaoyuanError, match=said):
        load(PretrainConfig, overrides=values)


def test_the_held_out_loss_is_the_models_mean_over_held_out_text(
    config: PretrainConfig, corpus: Corpus, tmp_path: Path
) -> None:
    pretrain(config, tmp_path)
    model = load_model(tmp_path / "model")
    stream = corpus.stream("held_out")
    one = config.model_copy(update={"held_out_tokens": 64})
    # One window, read straight from the stream: it begins where the loader says, documents apart.
    batches = TokenBatches(stream, 0, 64, 64)
    begin = batches.window(0)
    ids = torch.tensor(stream.tokens[begin : begin + 65].astype("int64"))
    starts = [int(s) - begin for s in stream.starts if begin < s < begin + 64]
    edges = [0, *starts, 64]
    positions, context = packed_context([b - a for a, b in itertools.pairwise(edges)])
    with torch.no_grad():
        expected = -float(model(ids[:-1], positions, context, targets=ids[1:]).mean())
    assert held_out_loss(corpus, one)(model)["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_started_again_it_gives_the_same_bytes(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config, tmp_path)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    pretrain(config, tmp_path)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "key"), [({"sequence_length": 32}, "sequence_length = 64, not 32"), ({"seed": 1}, r"train\.seed = 0")]
)
def test_a_folder_of_another_run_is_refused_and_left_alone(
    change: dict[str, int], key: str, config: PretrainConfig, tmp_path: Path
) -> None:
    pretrain(config, tmp_path)
    before = (tmp_path / "config.toml").read_text()
    other = config.model_copy(update=change if "seed" not in change else {"train": TRAIN.model_copy(update=change)})
    with pytest.raises(LiaoyuanError, match=key):
        pretrain(other, tmp_path)
    assert (tmp_path / "config.toml").read_text() == before


def test_it_goes_on_from_the_weights_of_a_model_folder(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config, tmp_path / "first")
    again = config.model_copy(update={"model": ShapeConfig(weights=tmp_path / "first" / "model")})
    pretrain(again, tmp_path / "second")
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("first", "second"))
    assert second < first - 0.2


def test_a_shape_that_does_not_fit_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    odd = SHAPE.model_copy(update={"num_attention_heads": 3, "num_key_value_heads": 2})
    with pytest.raises(LiaoyuanError, match=r"\[model\].*num_key_value_heads must divide num_attention_heads"):
        pretrain(config.model_copy(update={"model": odd}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_experts_are_refused_where_the_family_has_none(config: PretrainConfig, tmp_path: Path) -> None:
    shape = config.model.model_copy(update={"model_type": "llama", "num_experts": 4})
    with pytest.raises(LiaoyuanError, match="model_type 'llama' has no experts"):
        pretrain(config.model_copy(update={"model": shape}), tmp_path)


def test_kernels_of_the_run_file_are_used_and_wrong_ones_refused(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(LiaoyuanError, match="no operator 'atention'"):
        pretrain(config.model_copy(update={"ops": {"atention": "reference"}}), tmp_path)
    try:
        pretrain(config.model_copy(update={"ops": {"attention": "reference"}}), tmp_path)
        assert {row.operator: row.kernel for row in ops.status()}["attention"] == "reference"
    finally:
        ops.configure({})


def test_a_machine_twice_as_fast_never_gets_a_smaller_run(corpus: Corpus) -> None:
    def machine(speed: float):  # type: ignore[no-untyped-def]
        return lambda shape, batch: speed / (shape.hidden_size**2 * shape.num_hidden_layers)

    runs = [choose_size(corpus.folder, 180, "cpu", measure=machine(1e9 * 2**power)) for power in range(0, 12, 2)]
    widths = [run.model.hidden_size for run in runs]
    tokens = [run.train.steps * run.train.batch_tokens for run in runs]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert all(run.train.batch_tokens % run.sequence_length == 0 for run in runs)
    for run, power in zip(runs, range(0, 12, 2), strict=True):
        rate = 1e9 * 2**power / (run.model.hidden_size**2 * run.model.num_hidden_layers)
        assert run.train.steps * run.train.batch_tokens <= 180 * rate * 1.1
    assert tokens[-1] > tokens[0]


def test_the_law_prefers_what_it_should() -> None:
    assert predicted_loss(1e6, 2e6, 1e9) < predicted_loss(1e6, 1e6, 1e9)
    assert predicted_loss(2e6, 1e6, 1e9) < predicted_loss(1e6, 1e6, 1e9)
    assert predicted_loss(1e6, 8e6, 1e6) > predicted_loss(1e6, 8e6, 8e6)  # repeated text is worth less than fresh
    assert [rung.shape.hidden_size for rung in LADDER] == sorted(rung.hidden_size for rung in LADDER)


def test_a_real_measurement_gives_a_run_that_runs(corpus: Corpus, tmp_path: Path) -> None:
    chosen = choose_size(corpus.folder, 0.05, "cpu", ladder=[Rung(32, 1, 16)])
    result = pretrain(chosen.model_copy(update={"held_out_tokens": 256}), tmp_path)
    assert result.steps == chosen.train.steps


def test_the_verb_train_prints_json_and_names_a_mistyped_key(corpus: Corpus, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch_tokens": 128, "warmup_steps": 1}
    sizes = SHAPE.model_dump(exclude={"weights"}, exclude_none=True)
    pairs = [*((f"train.{k}", v) for k, v in settings.items()), *((f"model.{k}", v) for k, v in sizes.items())]
    options = [part for key, value in pairs for part in ("--set", f"{key}={str(value).lower()}")]
    command = ["train", "--corpus", str(corpus.folder), "--out", str(tmp_path), "--set", "sequence_length=64", "--json"]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["tokens"] == 256
    with pytest.raises(LiaoyuanError, match=r"Unknown key 'train\.step' .* did you mean 'steps'"):
        CliRunner().invoke(app, [*command, "--set", "train.step=3"], catch_exceptions=False)

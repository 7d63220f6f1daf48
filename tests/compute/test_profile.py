"""`ops profile` divides a step's time without remainder, and holds every operator against its own formulas."""

import math
import shutil
import time

import pytest
import torch

from liaoyuan import config as configuration
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.compute import profile as room
from liaoyuan.compute.compare import Way, compare
from liaoyuan.compute.profile import Profile, Subject, grouped, profile
from liaoyuan.compute.profile_page import profile_page
from liaoyuan.compute.profile_subject import Size, open_subject
from liaoyuan.compute.subject import random_stream, some_batches
from liaoyuan.device import Device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Quantisation, config_from_dict
from liaoyuan.ops import configure, seek_exactness
from liaoyuan.ops.cost import Cost, cost_of, group_of
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.ops.watch import Watch
from liaoyuan.training.flops import training_flops
from liaoyuan.training.pretrain import PretrainConfig, pretrain
from tests.conftest import randomised
from tests.parallel.layouts import COMMON

WORDS = COMMON | {"model_type": "qwen3", "num_hidden_layers": 2}
CPU = Device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model"
    save_model(randomised(config_from_dict(WORDS), 0), path, None)
    return path


@pytest.fixture(autouse=True)
def _rates_in_an_instant(monkeypatch):
    monkeypatch.setattr(room, "RATE_SECONDS", 0.01)


def take(folder, mode: str = "train", steps: int = 2, **size: int) -> Profile:
    size = {"tokens": 48, "sequences": 3, "steps": 2 * steps + 4} | size
    return profile(open_subject(folder, mode, CPU, None, Size(**size), []), steps)


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_the_parts_of_a_step_add_up_to_it(folder, mode):
    found = take(folder, mode)
    parts = [row.seconds for row in found.operators] + [found.between_seconds, found.measuring_seconds]
    assert sum(parts) == pytest.approx(found.step_seconds, rel=1e-9) and min(parts) >= 0
    assert sum(found.share(part) for part in parts) == pytest.approx(1.0)
    assert sum(row.seconds for row in grouped(found.operators)) == pytest.approx(
        sum(row.seconds for row in found.operators)
    )
    phases = {row.phase for row in found.operators}
    assert phases == ({"forward", "backward", "update"} if mode == "train" else {"forward"})


def test_the_plain_values_have_the_documented_keys(folder):
    found = take(folder).to_dict()
    assert found.keys() >= {"subject", "mode", "device", "dtype", "threads", "parameters", "tokens", "steps"}
    assert found.keys() >= {"step_seconds", "plain_step_seconds", "between_seconds", "measuring_seconds", "rates"}
    assert all(
        row.keys()
        == {
            *("phase", "group", "operator", "calls", "seconds", "share"),
            *("flops", "traffic", "roof_seconds", "roof_share", "bound"),
        }
        for row in found["operators"]
    )
    assert found["rates"].keys() == {"float32", "memory"}


def test_flops_are_those_that_training_counts(folder):
    """The operators' own formulas add up to the model's, which counts norms as if they were products, and not what
    attention computes again going backward."""
    found = take(folder, tokens=48)
    counted = {row.operator: row.flops for row in found.operators if row.flops}
    if "attention" not in counted:
        pytest.skip("this machine has no kernels")
    model = randomised(config_from_dict(WORDS), 0)
    (batch,) = some_batches(random_stream(model.config.vocab_size, 1, 48), 1, 48)
    again = counted["attention_backward"] - 2 * counted["attention"]
    assert again == counted["attention"] / 2
    norms = 6 * 48 * sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    expected = training_flops(model.config, batch.boundaries) - norms
    assert sum(counted.values()) - again == pytest.approx(expected, rel=1e-9)


def test_an_operator_is_held_against_the_larger_of_its_two_limits(folder):
    found = take(folder)
    for row in found.operators:
        products = row.flops / found.rates["float32"]
        moved = row.traffic / found.rates["memory"]
        assert max(products, moved) <= row.roof_seconds * (1 + 1e-9) <= (products + moved) * (1 + 1e-9) + 1e-15
        assert row.bound == ("products" if products > moved else "memory")


def test_a_call_costs_what_its_formulas_say():
    model = torch.nn.Linear(4, 8, bias=False)
    costs = {}

    def around(call, compute):
        output = compute()
        costs[call.operator] = (cost_of(call, output), group_of(call.operator, call.function))
        return output

    rms_norm = OPERATORS["rms_norm"].call
    with Watch(model, around), torch.no_grad():
        x = model(torch.randn(6, 4))
        x.mul(2.0)
        x.sum()
        x.view(-1)
        rms_norm(x, torch.ones(8), 1e-6)
    assert costs["aten.mm"][0].flops == 2 * 6 * 4 * 8 and costs["aten.mm"][1] == "matrix products"
    assert costs["aten.mm"][0].traffic == 4 * (6 * 4 + 4 * 8 + 6 * 8)
    assert costs["aten.mul"] == (cost_of_bytes(2 * 4 * 6 * 8), "element-wise")
    assert costs["aten.sum"][1] == "reductions"
    assert costs["aten.view"] == (cost_of_bytes(0), "views")
    assert costs["rms_norm"] == (cost_of_bytes(2 * 4 * 6 * 8), "liaoyuan")


def cost_of_bytes(count: int) -> Cost:
    return Cost(0, count, torch.float32)


def test_time_in_an_operator_and_time_between_operators_are_told_apart():
    """A step that sleeps between two operators."""
    model = torch.nn.Linear(256, 256)
    x = torch.randn(512, 256)

    def step() -> None:
        model(x)
        time.sleep(0.05)

    found = profile(Subject(model, step, CPU), 2)
    assert found.between_seconds >= 0.045
    assert sum(row.seconds for row in found.operators) < found.step_seconds - 0.045
    (product,) = (row for row in found.operators if row.group == "matrix products")
    assert product.calls == 1 and product.flops == 2 * 512 * 256 * 256


def test_decoding_computes_one_token_of_each_sequence(folder):
    found = take(folder, "decode", sequences=3)
    layers = {row.calls for row in found.operators if row.operator in ("paged_attention", "write_cache")}
    assert layers <= {2} and found.facts["tokens"] == 3 and found.facts["context"] == 48


def test_a_run_s_own_settings_hold(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder, target_is_directory=True)
    (run / "config.toml").write_text(
        'corpus = "gone"\nsequence_length = 16\n[train]\nsteps = 3\nbatch_tokens = 64\nmicrobatches = 2\n'
        '[ops]\nswiglu = "reference"\n'
    )
    try:
        found = profile(open_subject(run, "train", CPU, None, Size(), []), 1)
        assert (found.facts["tokens"], found.facts["sequence_length"], found.facts["microbatches"]) == (64, 16, 2)
        assert "swiglu" not in {row.operator for row in found.operators}
        assert sum(row.calls for row in found.operators if row.operator == "attention") == 2 * 2
    finally:
        configure({})


def test_exact_training_without_kernels_is_profiled(folder):
    configure({"swiglu": "reference"})
    seek_exactness()
    try:
        found = profile(open_subject(folder, "train", CPU, None, Size(), []), 1)
        assert {"swiglu", "swiglu_backward"} <= {row.operator for row in found.operators}
    finally:
        seek_exactness(False)
        configure({})


@pytest.mark.parametrize(
    ("mode", "size", "told"),
    [
        ("decode", Size(tokens=60, steps=10), "64 positions, but 60 tokens and 10 more"),
        ("train", Size(tokens=700), "--tokens 700 must be a multiple of 512"),
    ],
)
def test_what_does_not_fit_is_a_sentence(folder, mode, size, told):
    with pytest.raises(LiaoyuanError, match=told):
        open_subject(folder, mode, CPU, None, size, [])


def test_few_bits_are_profiled_where_nothing_is_learned(folder, tmp_path):
    save_model(load_model(folder, quantisation=Quantisation("int8")), tmp_path / "few")
    found = take(tmp_path / "few", "decode")
    assert any(row.operator.startswith("quantised_") for row in found.operators)
    with pytest.raises(LiaoyuanError, match="few bits, which have no gradients"):
        take(tmp_path / "few", "train")


def test_a_torn_config_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(LiaoyuanError, match="not valid JSON"):
        open_subject(tmp_path, "decode", CPU, None, Size(), [])


def test_the_page_shows_the_step_and_the_roof(folder):
    page = profile_page(take(folder)).html()
    assert page.count("<svg") == 2 and "attention_backward" in page and "http" not in page.replace("http-equiv", "")
    assert all(word in page for word in ("between operators", "算子之间", "FLOPs per byte"))
    assert "nan" not in page and not math.isnan(take(folder).step_seconds)


def test_a_run_file_is_profiled_before_it_has_run(run_file):
    """From fresh weights of the shape that it names; nothing is written."""
    before = sorted(run_file.parent.rglob("*"))
    subject = open_subject(run_file, "train", CPU, None, Size(), ["model.num_hidden_layers=3"])
    found = profile(subject, 1)
    assert (found.facts["tokens"], found.facts["sequence_length"], found.facts["dtype"]) == (256, 64, "float32")
    assert len(subject.model.layers) == 3
    assert sorted(run_file.parent.rglob("*")) == before


def test_a_run_under_way_is_compared_and_profiled(run_file, tmp_path):
    """It has no model folder yet: the newest state is read."""
    config = configuration.load(PretrainConfig, run_file, ["train.steps=2", "train.checkpoint_every=1"])
    pretrain(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert profile(open_subject(tmp_path / "run", "prefill", CPU, None, Size(32), []), 1).facts["tokens"] == 32
    way = Way(tmp_path / "run")
    found = compare(way, way, lambda model, _, *size: random_stream(model.config.vocab_size, *size), 1, 32)
    assert not found.differs and found.rows

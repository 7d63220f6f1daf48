"""Exact mode over several processes: serving under a layout gives the bits of training under that layout."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from liaoyuan import ops
from liaoyuan.checkpoint import load_weights, save_model
from liaoyuan.cli.main import app
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, Engine, EngineConfig, Proof, prove
from liaoyuan.inference.exactness.paths import Extent
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.inference.spread.trained import Trained
from liaoyuan.models import Decoder, Quantisation, config_from_dict, packed_context, read_config
from liaoyuan.parallel import Layout, World, check_inference, lay_out
from liaoyuan.rundir import silent
from tests.conftest import randomised, slow_if
from tests.inference.test_exact_mode import planted
from tests.inference.test_ranks import SIZES, asked, generate, on_ranks, work_together
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run

LARGER = {"vocab_size": 1100, "max_position_embeddings": 256}  # so that no two probes have a token in common
SMALL = Extent(lengths=(1, 17, 20), tokens=6, batches=(2,), chunks=(7,))
TWO, EXPERTS = Layout(tp=2, exact=True), Layout(tp=2, ep=2, exact=True)
CASES = [
    ("dense", "float32", TWO),
    ("dense", "bfloat16", TWO),
    ("experts", "float32", EXPERTS),
    ("experts", "bfloat16", EXPERTS),
    ("latent", "bfloat16", TWO),
    ("sinks", "bfloat16", Layout(tp=4, ep=2, exact=True)),
]
QUICKEST = [CASES[0], CASES[3], CASES[4]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    def folder(kind: str, dtype: str = "float32") -> Path:
        made: Path = tmp_path_factory.mktemp(kind)
        config = replace(config_from_dict(MODELS[kind] | LARGER), dtype=dtype)
        save_model(randomised(config, 3), made / "model", None)
        return made / "model"

    return folder


@pytest.fixture(autouse=True)
def native_kernels() -> Iterator[None]:
    if any(row.kernel != "native" for row in ops.status()):
        pytest.skip("not all native kernels are in use here, and the references are not exact")
    yield
    ops.configure({})


def proof_of(leader: Leader, extent: Extent = SMALL) -> Proof:
    return prove(leader.model, extent, silent, leader)


def rollouts_and_training(world: World, folder: Path, layout: Layout) -> tuple[list[float], list[float]]:
    """Return the log-probabilities of what an engine samples, and those of the same tokens in a training step."""
    (sampled,) = work_together(world, folder, layout, generate, (SIZES, asked())) or ([],)
    own = [[request.prompt, one.tokens, one.logprobs] for request, one in zip(asked(), sampled, strict=False)]
    rows = json.loads(world.broadcast(json.dumps(own)))
    with torch.device("meta"):
        model = Decoder(read_config(folder))
    program = lay_out(model, layout, world.arrange(layout.model_copy(update={"fsdp": 1}))).train()
    load_weights(program, folder)
    texts = [prompt + tokens for prompt, tokens, _ in rows]
    texts += [[0, 0]] * (-sum(len(text) - 1 for text in texts) % world.size)
    inputs, targets = (torch.tensor([x for text in texts for x in text[part]]) for part in (slice(-1), slice(1, None)))
    lengths = [len(text) - 1 for text in texts]
    log_probs = program.models[0](inputs, *packed_context(lengths), targets)
    assert log_probs.requires_grad
    found = [x[len(row[0]) - 1 :].tolist() for x, row in zip(log_probs.split(lengths), rows, strict=False)]
    return [x for _, _, values in rows for x in values], [x for values in found for x in values]


@pytest.mark.parametrize(("kind", "layout"), [("dense", TWO), ("experts", EXPERTS)])
def test_what_is_sampled_has_the_bits_of_the_training_step_that_learns_from_it(
    folder_of: Any, kind: str, layout: Layout
) -> None:
    folder = folder_of(kind, "bfloat16")
    for is_exact in (True, False):
        sampled, learnt = run(2, rollouts_and_training, folder, layout.model_copy(update={"exact": is_exact}))[1]
        assert len(sampled) == 96 and (sampled == learnt) is is_exact


@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [slow_if(case not in QUICKEST, *case, name=f"{case[0]}-{case[1]}-{case[2].describe()}") for case in CASES],
)
def test_every_path_gives_the_bits_of_training_in_the_same_layout(
    folder_of: Any, kind: str, dtype: str, layout: Layout
) -> None:
    proof = on_ranks(layout.tp, folder_of(kind, dtype), layout, proof_of)
    assert [result for result in proof.results if not result.equal] == []
    assert proof.exact and len(proof.results) == 11 and proof.dtype == dtype
    assert proof.against == f"training under {layout.describe()}"
    assert proof.verdict.startswith(f"Exact under {layout.describe()}: all ")


def proof_with_a_plant(world: World, name: str, is_wrong: Any, *where: Any) -> Any:
    """Return the proof of a model of which the second process has an operator that errs in some batches."""
    with planted(name, is_wrong) if world.rank == 1 else contextlib.nullcontext():
        return work_together(world, *where, proof_of, ())


DENSE_ERROR = ("swiglu", lambda inputs: len(inputs[0]) < 4, "dense", "swiglu of layers.0.mlp")
EXPERTS_ERROR = ("swiglu", lambda inputs: len(inputs[0]) == 1, "experts", "swiglu of layers.0.mlp.experts")


@pytest.mark.parametrize(
    ("name", "is_wrong", "kind", "blamed"),
    [
        slow_if(True, *DENSE_ERROR),
        ("paged_attention", lambda inputs: len(inputs[5]) > 2, "latent", "attention of layers.0.self_attn"),
        slow_if(True, *EXPERTS_ERROR),
    ],
)
def test_an_operator_that_errs_in_one_process_is_named_with_it(
    folder_of: Any, name: str, is_wrong: Any, kind: str, blamed: str
) -> None:
    proof = run(2, proof_with_a_plant, name, is_wrong, folder_of(kind), EXPERTS if kind == "experts" else TWO)[0]
    assert not proof.exact and proof.verdict.startswith("Not exact under tp 2")
    assert f"The first operator whose bits differ is {blamed}, in process 1." in proof.verdict


def loose_of(world: World, *where: Any) -> Any:
    """Return the proof of a model of which the second process computes norms by the reference."""
    if world.rank == 1:
        ops.configure({"rms_norm": "reference"})
    return work_together(world, *where, proof_of, (SMALL,))


def test_every_process_must_have_kernels_that_promise_it(folder_of: Any) -> None:
    proof = run(2, loose_of, folder_of("dense"), TWO)[0]
    assert not proof.exact and "rms_norm" in proof.loose


def kept_proofs(leader: Leader, cache: Path) -> Any:
    """Return what engines say that ask for exactness twice, and how many proofs were made."""
    made = []

    def prove_few(model: Decoder, _: Extent, *more: Any) -> Proof:
        made.append(1)
        return prove(model, SMALL, *more)

    with pytest.MonkeyPatch.context() as patch:
        ops.status()
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr("liaoyuan.inference.exactness.proof.library_path", lambda: cache / "kernels.so")
        patch.setattr("liaoyuan.inference.exactness.proof.prove", prove_few)
        engines = [Engine(leader.model, EngineConfig(exact=True), memory=leader) for _ in range(2)]
    return [(told["exact"], told["layout"]) for told in (engine.statistics() for engine in engines)], len(made)


def test_a_proof_is_kept_for_each_layout(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("experts")
    for layout in (EXPERTS, TWO):
        said, made = on_ranks(2, folder, layout, kept_proofs, tmp_path)
        assert said == [(True, layout.describe())] * 2 and made == 1


def refusal(leader: Leader) -> str:
    with pytest.raises(LiaoyuanError) as refused:
        prove(leader.model, QUICK, silent, leader)
    return str(refused.value)


def test_layouts_of_which_nothing_can_be_proven_are_refused(folder_of: Any) -> None:
    assert "keeps experts whole" in on_ranks(2, folder_of("dense"), Layout(tp=2), refusal)
    with pytest.raises(LiaoyuanError, match="4 do not divide the 6 experts"):
        check_inference(Layout(tp=4, exact=True), config_from_dict(MODELS["experts"] | {"num_experts": 6}))
    with pytest.raises(LiaoyuanError, match="start more replicas"):
        check_inference(Layout(pp=2, exact=True), config_from_dict(MODELS["dense"]))


def without_training(leader: Leader) -> Proof:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trained, "is_known", False)
        return proof_of(leader, SMALL)


def test_weights_that_training_does_not_know_are_compared_with_whole_texts(folder_of: Any) -> None:
    proof = on_ranks(2, folder_of("dense"), TWO, without_training)
    assert proof.exact and proof.against == "the model's own forward over whole texts under tp 2"
    assert proof.results[0].path == "whole texts, packed"


def small_proof(leader: Leader) -> Proof:
    return proof_of(leader, SMALL)


def test_weights_of_few_bits_are_exact_in_a_layout_too(folder_of: Any) -> None:
    proof = on_ranks(2, folder_of("experts"), EXPERTS, small_proof, few_bits=Quantisation("int8"))
    assert proof.exact and proof.against == "the model's own forward over whole texts under tp 2 (experts over 2)"


def test_doctor_proves_a_layout(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liaoyuan.inference.FULL", SMALL)
    asked = ["doctor", "--exact", str(folder_of("experts")), "--tp", "2", "--ep", "2", "--dtype", "bfloat16"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0 and "compared with training under tp 2 (experts over 2), bfloat16" in told.stdout
    assert "Exact under tp 2 (experts over 2): all" in told.stdout
    told = CliRunner().invoke(app, ["doctor", "--tp", "2"])
    assert told.exit_code != 0 and "they need --exact MODEL" in str(told.exception)

"""Exact mode: however a model computes a token, its log-probability has the bits that training's forward gives it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from liaoyuan import ops
from liaoyuan.checkpoint import save_model
from liaoyuan.cli.main import app
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import QUICK, Completion, Engine, EngineConfig, Request, SamplingParams, prove
from liaoyuan.inference.exactness import paths as exact_paths
from liaoyuan.inference.exactness.proof import find_proof
from liaoyuan.inference.scoring import prompt_logprobs
from liaoyuan.models import Decoder, ModelConfig, Quantisation, packed_context
from liaoyuan.models.config import Experts, Latent
from liaoyuan.models.quantised import quantise_model
from liaoyuan.ops.operator import OPERATORS
from liaoyuan.rundir import silent
from tests.conftest import randomised

TWO_THREADS = replace(QUICK, lengths=(1, 16, 40), threads=(1, 2))
SIZES = {
    "model_type": "qwen3", "vocab_size": 1100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = Experts(8, 2, 24, shared_intermediate_size=16, dense_layers=(0,))
FEATURES = {
    "dense": {"qk_norm": True, "tie_word_embeddings": True},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "post_norms": True},
    "window and sinks": {"sliding_window": 9, "full_layers": (1,), "attention_sinks": True},
    "latent": {
        "num_key_value_heads": 4, "head_dim": 24,
        "latent": Latent(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20),
    },
    "experts": {"experts": EXPERTS},
    "experts by groups": {"experts": replace(EXPERTS, scoring="sigmoid", n_group=4, topk_group=2, group_best=2)},
}  # fmt: skip
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def native_kernels():
    if any(row.kernel != "native" for row in ops.status()):
        pytest.skip("not all native kernels are in use here, and the references are not exact")
    yield
    ops.seek_exactness(False)
    ops.configure({})


def model_of(feature: str, dtype: str = "float32") -> Decoder:
    return randomised(ModelConfig(**SIZES | FEATURES[feature] | {"dtype": dtype}), seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_path_gives_the_bits_of_training(feature: str, dtype: str) -> None:
    proof = prove(model_of(feature, dtype), QUICK)
    assert [result for result in proof.results if not result.equal] == []
    assert proof.exact and proof.verdict.startswith("Exact: ")
    assert len(proof.results) == 11 and proof.dtype == dtype
    assert set(proof.kernels.values()) == {"native"} and {"loss_head", "sample_tokens"} <= proof.kernels.keys()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("feature", ["dense", "experts"])
def test_weights_of_few_bits_are_exact_too(feature: str, kind: str) -> None:
    quantised = pytest.importorskip("liaoyuan.models.quantised")
    wide = SIZES | FEATURES[feature] | {"hidden_size": 96, "intermediate_size": 160, "dtype": "bfloat16"}
    model = quantised.quantise_model(randomised(ModelConfig(**wide), seed=3), quantised.Quantisation(kind))
    proof = prove(model, QUICK)
    assert proof.exact and "quantised_linear" in proof.kernels


def test_two_threads_give_the_bits_of_one() -> None:
    before = torch.get_num_threads()
    proof = prove(model_of("experts", "bfloat16"), TWO_THREADS)
    assert proof.exact and {result.threads for result in proof.results} == {1, 2}
    assert torch.get_num_threads() == before


def test_tokens_that_experts_tie_for_go_to_the_same_experts_on_every_path() -> None:
    model = model_of("experts")
    with torch.no_grad():
        for _, router in model.routers():
            router.weight.copy_(router.weight[:1].expand_as(router.weight))
    assert prove(model, QUICK).exact


# ---- what is not exact is found, named and not claimed


@contextlib.contextmanager
def planted(name: str, is_wrong: Callable[[tuple[Any, ...]], bool]) -> Iterator[None]:
    """Put a kernel behind an operator that gives the neighbouring floats in some batches, and claims to be exact.

    Until kernels are chosen anew, as they are when exactness is first asked for.
    """
    operator = OPERATORS[name]

    def compute(*inputs: Any) -> Any:
        output = operator.reference(*inputs)
        return torch.nextafter(output, torch.tensor(torch.inf)) if is_wrong(inputs) else output

    ops.configure({"decoder_layer": "reference"})  # whose kernel does not ask for its parts
    ops.status()  # chooses all kernels anew
    torch.ops.liaoyuan_native.use(name, False)
    library = torch.library.Library("liaoyuan", "IMPL")
    library.impl(name, compute, "CPU")
    operator.call._dispatch_cache.clear()
    try:
        yield
    finally:
        library._destroy()
        torch.ops.liaoyuan_native.use(name, True)
        operator.call._dispatch_cache.clear()
        ops.configure({})


@pytest.mark.parametrize(
    ("name", "is_wrong", "feature", "blamed"),
    [
        ("swiglu", lambda inputs: len(inputs[0]) < 4, "dense", "swiglu of layers.0.mlp"),
        ("paged_attention", lambda inputs: len(inputs[5]) > 2, "latent", "attention of layers.0.self_attn"),
        ("grouped_linear", lambda inputs: len(inputs[0]) in (2, 4), "experts", "grouped_linear of layers.1.mlp"),
        ("combine_rows", lambda inputs: len(inputs[0]) == 2, "experts", "combine_rows of layers.1.mlp"),
    ],
)
def test_an_operator_that_computes_small_batches_in_another_way_is_named(name, is_wrong, feature, blamed) -> None:
    model = model_of(feature)
    with planted(name, is_wrong):
        proof = prove(model, QUICK)
    assert not proof.exact and proof.loose == ()
    assert proof.operator.startswith(blamed), proof.verdict
    assert f"The first operator whose bits differ is {blamed}" in proof.verdict


def test_bits_that_are_equal_by_luck_are_no_proof() -> None:
    """The stock products of these few sizes agree, but nothing promises that they do for others."""
    ops.configure({"rms_norm": "reference"})
    proof = prove(model_of("dense"), QUICK)
    assert all(result.equal for result in proof.results) and not proof.exact
    assert "rms_norm had no kernel that promises it" in proof.verdict


def test_a_path_that_was_not_gone_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_paths, "SHARES", (4.0,))
    proof = prove(model_of("dense"), QUICK)
    assert not proof.exact and "after preemption, 1 thread: nobody was preempted" in proof.verdict


# ---- engines, servers and rollouts say whether they are exact


def test_an_engine_that_must_be_exact_is_refused_where_it_cannot_be(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = model_of("dense")
    ops.seek_exactness()
    refused = r"Exact mode was asked for and cannot be had. Not exact: .*swiglu"
    with planted("swiglu", lambda inputs: len(inputs[0]) < 4), pytest.raises(LiaoyuanError, match=refused):
        Engine(model, EngineConfig(exact=True))
    for exact, said in ((None, "not proven"), (False, False)):
        assert Engine(model, EngineConfig(exact=exact)).statistics()["exact"] == said


def test_a_proof_is_kept_for_the_same_weights(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    ops.status()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.library_path", lambda: tmp_path / "kernels.so")
    assert Engine(model, EngineConfig(exact=True)).statistics()["exact"] is True
    kept = find_proof(model)
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove", lambda *_: pytest.fail("it was proven again"))
    assert find_proof(model) == kept and kept.exact
    with torch.no_grad():
        model.norm.weight += 1
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove", lambda *_: replace(kept, results=()))
    assert not find_proof(model).exact


def test_doctor_shows_the_proof_and_its_status_says_the_verdict(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model_of("dense"), tmp_path / "model", None)
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove.__defaults__", (QUICK, silent, None))
    told = CliRunner().invoke(app, ["doctor", "--exact", str(tmp_path / "model")])
    assert told.exit_code == 0 and "Exact: all" in told.stdout and "speculation" in told.stdout
    with planted("swiglu", lambda inputs: len(inputs[0]) < 4):
        told = CliRunner().invoke(app, ["doctor", "--exact", str(tmp_path / "model"), "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 1 and found["exact"] is False
    assert found["operator"] == "swiglu of layers.0.mlp"


@pytest.mark.parametrize("dtype", DTYPES)
def test_doctor_proves_a_folder_of_few_bits(dtype: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(quantise_model(model_of("dense", dtype), Quantisation("int8")), tmp_path / "few", None)
    monkeypatch.setattr("liaoyuan.inference.exactness.proof.prove.__defaults__", (QUICK, silent, None))
    told = CliRunner().invoke(app, ["doctor", "--exact", str(tmp_path / "few")])
    assert told.exit_code == 0 and "Exact: all" in told.stdout


@pytest.mark.parametrize("feature", ["dense", "experts"])
def test_a_prompt_that_is_scored_in_one_pass_has_the_scores_and_rivals_of_a_request(feature: str) -> None:
    engine, prompt = Engine(model_of(feature)), tuple((7 * n * n + 3 * n) % 1100 for n in range(60))
    found = prompt_logprobs(engine, "", prompt, 2000)  # all tokens are rivals, the prompt's own among them
    assert [dict(row)[token] for token, row in zip(prompt[1:], found.top, strict=True)] == found.logprobs
    asked = Request(0, prompt, SamplingParams(max_tokens=1, prompt_logprobs=2000))
    assert engine.generate([asked])[0].prompt == found


# ---- whatever is asked of an engine, in whatever company

MODEL = {}


@settings(max_examples=12)
@given(data=st.data())
def test_any_mix_of_requests_is_answered_as_each_alone_and_as_training_computes_it(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["dense", "experts", "window and sinks"]))
    model = MODEL.setdefault(kind, model_of(kind, "bfloat16"))
    shared = tuple(range(40))
    asked = data.draw(
        st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=9)
    )
    requests = [
        Request(
            place,
            (shared[:common] + tuple((7 * place + token) % 1100 for token in range(length)))[-200:],
            SamplingParams(max_tokens=count, seed=place, prompt_logprobs=0 if length % 2 else None),
            priority=length % 3,
        )
        for place, (length, common, count) in enumerate(asked)
    ]
    sequences = data.draw(st.integers(1, 6))
    sizes = EngineConfig(
        max_sequences=sequences,
        max_batch_tokens=data.draw(st.integers(sequences, 90)),
        block_size=data.draw(st.sampled_from([4, 16])),
        cache_tokens=data.draw(st.integers(240, 500)),
        speculate=data.draw(st.sampled_from(["", "ngram"])),
    )
    together = Engine(model, sizes).generate(requests)
    for request, one in zip(requests, together, strict=True):
        assert one.logprobs == alone(model, request).logprobs and one.tokens == alone(model, request).tokens
        expected = of_training(model, request.prompt + tuple(one.tokens))
        given_ = [*(one.prompt.logprobs if one.prompt else []), *one.logprobs]
        assert given_ == expected[-len(given_) :]


def alone(model: Decoder, request: Request) -> Completion:
    return Engine(model, EngineConfig(max_sequences=1, cache_tokens=512)).generate([request])[0]


def of_training(model: Decoder, text: tuple[int, ...]) -> list[float]:
    positions, context = packed_context([len(text) - 1])
    found = model(torch.tensor(text[:-1]), positions, context, targets=torch.tensor(text[1:]))
    assert found.requires_grad
    return found.tolist()

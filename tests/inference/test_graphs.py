"""Captured decode steps: the same answers. A stand-in captures here as a device does, or calls are recorded."""

import dataclasses
from typing import Any

import pytest
import torch

from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams, model_step
from liaoyuan.models import Decoder, ModelConfig, rotary
from liaoyuan.models.config import Experts
from liaoyuan.models.quantised import Quantisation, quantise_model
from liaoyuan.ops.quantised_linear import Kind
from tests.conftest import randomised
from tests.inference.stand_in_graphs import stand_in


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return stand_in(monkeypatch)


def asked(count: int) -> list[Request]:
    sampling = [SamplingParams(max_tokens=5 + 9 * index, seed=index, top_logprobs=2) for index in range(count)]
    return [Request(index, tuple(range(1 + 7 * index)), sampling[index]) for index in range(count)]


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_captured_steps_give_the_same_answers(tiny_model: Decoder, sequences: int, captured: dict[str, int]) -> None:
    engine = Engine(tiny_model, EngineConfig(max_sequences=sequences, graphs=True))
    plain = Engine(tiny_model, EngineConfig(max_sequences=sequences, graphs=False)).generate(asked(8))
    for one, other in zip(engine.generate(asked(8)), plain, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
    assert 2 <= captured["captured"] <= 16 < captured["replayed"]


@pytest.mark.parametrize("way", ["captured", "recorded"])
def test_after_sleep_steps_are_captured_anew(tiny_model: Decoder, way: str, request: pytest.FixtureRequest) -> None:
    if way == "captured":
        request.getfixturevalue("captured")
    engine = Engine(tiny_model, EngineConfig(graphs=True))
    first = engine.generate(asked(2))
    other = randomised(tiny_model.config, 4)
    engine.sleep(without_weights=True)
    engine.wake()
    engine.update_weights(dict(other.state_dict()))
    engine.resume()
    assert [one.tokens for one in engine.generate(asked(2))] == [one.tokens for one in Engine(other).generate(asked(2))]
    assert [one.tokens for one in first] != [one.tokens for one in engine.generate(asked(2))]


@pytest.mark.usefixtures("captured")
def test_a_step_that_only_scores_is_not_captured(tiny_model: Decoder) -> None:
    asked_once = [Request(0, tuple(range(9)), SamplingParams(max_tokens=4, prompt_logprobs=0))]
    sizes = {"max_sequences": 1, "max_batch_tokens": 1}  # so each step scores one token of the prompt, and draws none
    found, plain = (Engine(tiny_model, EngineConfig(**sizes, graphs=on)).generate(asked_once) for on in (True, False))
    assert found[0].tokens == plain[0].tokens
    assert found[0].prompt and plain[0].prompt
    assert found[0].prompt.logprobs == pytest.approx(plain[0].prompt.logprobs, abs=1e-4)


def recorded(engine: Engine) -> list[Any]:
    """Return the steps that an engine on a CPU has recorded."""
    assert engine._step._graphs is not None
    return list(engine._step._graphs._captured.values())


def answers(engine: Engine, count: int = 3) -> list[tuple[list[int], list[float]]]:
    return [(one.tokens, one.logprobs) for one in engine.generate(asked(count))]


def test_on_a_cpu_calls_are_recorded_and_give_the_same_bits(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model)
    assert answers(engine) == answers(Engine(tiny_model, EngineConfig(graphs=False)))
    assert 1 <= len(recorded(engine)) <= 4
    assert answers(engine) == answers(engine)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_weights_of_few_bits_are_recorded_once(tiny_config: ModelConfig, kind: Kind) -> None:
    wide = dataclasses.replace(tiny_config, hidden_size=128, intermediate_size=128, head_dim=32)
    model = quantise_model(randomised(wide, seed=3), Quantisation(kind))
    engine = Engine(model)
    first = answers(engine)
    steps = recorded(engine)
    assert first == answers(Engine(model, EngineConfig(graphs=False)))
    assert steps
    assert answers(engine) == first
    assert {id(one) for one in recorded(engine)} == {id(one) for one in steps}


def test_weights_that_are_others_are_read(tiny_model: Decoder) -> None:
    """Also those that somebody puts in the place of the old ones while the engine is idle."""
    model, other = randomised(tiny_model.config, 1), randomised(tiny_model.config, 2)
    engine = Engine(model)
    before = answers(engine)
    layer, given = model.layers[0].mlp.down_proj, other.layers[0].mlp.down_proj.weight  # type: ignore[union-attr]
    layer.weight = torch.nn.Parameter(given.detach().clone())  # type: ignore[union-attr]
    assert answers(engine) == answers(Engine(model, EngineConfig(graphs=False))) != before
    between = answers(engine)
    model.embed_tokens.weight = torch.nn.Parameter(other.embed_tokens.weight.detach().clone())
    assert answers(engine) == answers(Engine(model, EngineConfig(graphs=False))) != between


def test_positions_beyond_the_table_of_angles_are_not_recorded(
    tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "TABLE", 20)
    monkeypatch.setattr(model_step, "TABLE", 20)
    rotary._angle_table.cache_clear()
    asked_once = [Request(0, (1, 2), SamplingParams(max_tokens=40, seed=1))]
    try:  # in one block, so that one recording would do for all
        found, plain = (
            Engine(tiny_model, EngineConfig(block_size=64, graphs=on)).generate(asked_once) for on in (None, False)
        )
        assert (found[0].tokens, found[0].logprobs) == (plain[0].tokens, plain[0].logprobs)
    finally:
        rotary._angle_table.cache_clear()


def test_a_model_with_experts_is_not_recorded(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, model_type="qwen3_moe", experts=Experts(4, 2, 24))
    model = randomised(config, seed=1)
    engine = Engine(model)
    assert answers(engine) == answers(Engine(model, EngineConfig(graphs=False)))
    assert not recorded(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_captures(tiny_model: Decoder) -> None:
    device = torch.accelerator.current_accelerator()
    model = tiny_model.to(device)
    plain, captured = (Engine(model, EngineConfig(graphs=on)).generate(asked(4)) for on in (False, True))
    assert [one.tokens for one in captured] == [one.tokens for one in plain]

"""Captured decode steps: the same answers. A stand-in captures here; on an accelerator the device does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams, graphs
from liaoyuan.models import Decoder
from tests.conftest import randomised

COUNTS: dict[str, int] = {}


def capture(function: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """Run now, and at each replay again into the same memory, as a device graph does."""
    logits, sampled = (one.clone() for one in function())
    COUNTS["captured"] = COUNTS.get("captured", 0) + 1

    def replay() -> None:
        COUNTS["replayed"] = COUNTS.get("replayed", 0) + 1
        for old, new in zip((logits, sampled), function(), strict=True):
            old.copy_(new)

    return (logits, sampled), replay


def asked(count: int) -> list[Request]:
    sampling = [SamplingParams(max_tokens=5 + 9 * index, seed=index, top_logprobs=2) for index in range(count)]
    return [Request(index, tuple(range(1 + 7 * index)), sampling[index]) for index in range(count)]


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_captured_steps_give_the_same_answers(
    tiny_model: Decoder, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "capture_on_device", capture)
    COUNTS.clear()
    engine = Engine(tiny_model, EngineConfig(max_sequences=sequences, graphs=True))
    plain = Engine(tiny_model, EngineConfig(max_sequences=sequences)).generate(asked(8))
    for one, other in zip(engine.generate(asked(8)), plain, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
    assert 2 <= COUNTS["captured"] <= 16 < COUNTS["replayed"]


def test_after_sleep_steps_are_captured_anew(tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture_on_device", capture)
    engine = Engine(tiny_model, EngineConfig(graphs=True))
    first = engine.generate(asked(2))
    other = randomised(tiny_model.config, 4)
    engine.sleep(without_weights=True)
    engine.wake()
    engine.update_weights(dict(other.state_dict()))
    engine.resume()
    assert [one.tokens for one in engine.generate(asked(2))] == [one.tokens for one in Engine(other).generate(asked(2))]
    assert [one.tokens for one in first] != [one.tokens for one in engine.generate(asked(2))]


def test_a_step_that_only_scores_is_not_captured(tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture_on_device", capture)
    asked_once = [Request(0, tuple(range(9)), SamplingParams(max_tokens=4, prompt_logprobs=0))]
    sizes = {"max_sequences": 1, "max_batch_tokens": 1}  # so each step scores one token of the prompt, and draws none
    found, plain = (Engine(tiny_model, EngineConfig(**sizes, graphs=on)).generate(asked_once) for on in (True, False))
    assert found[0].tokens == plain[0].tokens
    assert found[0].prompt and plain[0].prompt
    assert found[0].prompt.logprobs == pytest.approx(plain[0].prompt.logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_captures(tiny_model: Decoder) -> None:
    device = torch.accelerator.current_accelerator()
    model = tiny_model.to(device)
    plain, captured = (Engine(model, EngineConfig(graphs=on)).generate(asked(4)) for on in (False, True))
    assert [one.tokens for one in captured] == [one.tokens for one in plain]

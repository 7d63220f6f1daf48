"""Promises of speculation: the answers are those that come without it, and they come in fewer steps."""

import dataclasses

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig
from tests.conftest import randomised
from tests.inference.test_drawing import Alternating

GREEDY = SamplingParams(max_tokens=60, temperature=0.0)


def asked(count: int = 12) -> list[Request]:
    """Requests of every kind: greedy ones run into loops, which can be guessed."""
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"frequency_penalty": 0.3, "presence_penalty": 0.2},
        {"constraint": Alternating(41), "stop_token_ids": (0,)},
        {"top_logprobs": 3, "processed_logprobs": True, "temperature": 0.3, "seed": 1},
        {"stop_token_ids": tuple(range(40, 60)), "min_tokens": 5},
        {"return_masks": True, "temperature": 0.5, "top_k": 3, "seed": 9},
        {"bad_words": ((11,), (5, 6)), "logit_bias": ((7, 3.0),)},
    ]
    made = []
    for index in range(count):
        prompt = (*range(index + 1), *range(index + 1))
        sampling = dataclasses.replace(GREEDY, **kinds[index % len(kinds)])  # type: ignore[arg-type]
        made.append(Request(index, prompt, dataclasses.replace(sampling, max_tokens=20 + 5 * index)))
    return made


def said(completions: list[Completion]) -> list[object]:
    return [
        (one.tokens, one.finish_reason, [[token for token, _ in top] for top in one.top_logprobs], len(one.masks))
        for one in completions
    ]


SIZES = [
    {},
    {"max_sequences": 1},
    {"max_sequences": 5, "cache_tokens": 144},
    {"max_batch_tokens": 9, "max_sequences": 4},
]


@pytest.mark.parametrize("sizes", SIZES)
def test_guessed_from_before_changes_nothing(tiny_model: Decoder, sizes: dict[str, int]) -> None:
    plain = Engine(tiny_model).generate(asked())
    engine = Engine(tiny_model, EngineConfig(speculate="ngram", **sizes))
    found = engine.generate(asked())
    assert said(found) == said(plain)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
    statistics = engine.statistics()
    assert statistics["guessed_right"] > 50
    assert statistics["free_blocks"] == statistics["blocks"]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 5])
def test_guessed_by_a_small_model_changes_nothing(
    tiny_model: Decoder, tiny_config: ModelConfig, sizes: dict[str, int], seed: int
) -> None:
    small = randomised(dataclasses.replace(tiny_config, num_hidden_layers=1), seed)
    engine = Engine(tiny_model, EngineConfig(**sizes), small)
    assert said(engine.generate(asked())) == said(Engine(tiny_model).generate(asked()))
    assert engine.statistics()["guessed_tokens"] > 0


def test_who_guesses_with_the_same_weights_is_always_right(tiny_model: Decoder) -> None:
    wanted = [Request(index, (1, 2, index), SamplingParams(max_tokens=61, seed=index)) for index in range(4)]
    engine = Engine(tiny_model, EngineConfig(speculate_tokens=4), tiny_model)
    assert said(engine.generate(wanted)) == said(Engine(tiny_model).generate(wanted))
    statistics = engine.statistics()
    assert statistics["guessed_right"] == statistics["guessed_tokens"]
    assert statistics["steps"] < 20
    found = engine.generate(wanted, keep_prefixes=True)  # its own cache knows these prompts
    assert said(found) == said(Engine(tiny_model).generate(wanted))


def test_two_ways_to_guess_are_refused(tiny_model: Decoder) -> None:
    with pytest.raises(LiaoyuanError, match="A draft model and speculate='ngram' both guess"):
        Engine(tiny_model, EngineConfig(speculate="ngram"), draft=tiny_model)


def test_events_carry_several_tokens(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(speculate_tokens=4), tiny_model)
    wanted = [dataclasses.replace(one, id=f"r{one.id}") for one in asked()]
    for request in wanted:
        engine.add(request)
    told: dict[object, list] = {}
    while engine.can_step:
        for event in engine.step():
            told.setdefault(event.id, []).append(event)
    for completion in Engine(tiny_model).generate(wanted):
        events = told[completion.id]
        assert [token for event in events for token in event.tokens] == completion.tokens
        assert len([top for event in events for top in event.top_logprobs]) == len(completion.top_logprobs)
        assert len([mask for event in events for mask in event.masks]) == len(completion.masks)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [completion.finish_reason]
    assert max(len(event.tokens) for events in told.values() for event in events) == 5


def test_sleep_and_new_weights_leave_guessing_right(tiny_model: Decoder, tiny_config: ModelConfig) -> None:
    engine = Engine(tiny_model, EngineConfig(speculate_tokens=4), tiny_model)
    engine.add(Request("a", (1, 2, 3), GREEDY))
    tokens = [token for _ in range(3) for event in engine.step() for token in event.tokens]
    engine.sleep()
    engine.wake()
    engine.resume()
    while engine.can_step:
        tokens += [token for event in engine.step() for token in event.tokens]
    assert tokens == Engine(tiny_model).generate([Request("a", (1, 2, 3), GREEDY)])[0].tokens


def test_another_vocabulary_is_refused(tiny_model: Decoder, tiny_config: ModelConfig) -> None:
    other = randomised(dataclasses.replace(tiny_config, vocab_size=97), 0)
    with pytest.raises(LiaoyuanError, match="97 tokens, but the model 96"):
        Engine(tiny_model, EngineConfig(), other)

"""Several decode steps between two looks at who comes and goes: the same answers, to the bit, with fewer looks."""

import numpy as np
import pytest
import torch

from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams, model_step
from liaoyuan.inference.request import Completion, Event
from liaoyuan.models import Decoder
from tests.inference.stand_in_graphs import stand_in

PLAIN = [
    SamplingParams(max_tokens=23, temperature=0.0),
    SamplingParams(max_tokens=40, seed=1),
    SamplingParams(max_tokens=17, seed=2, top_k=20, top_p=0.9),
    SamplingParams(max_tokens=1, seed=3),
    SamplingParams(max_tokens=33, temperature=0.7, seed=4, min_p=0.02, stop_token_ids=tuple(range(40))),
]
TOLD = [
    SamplingParams(max_tokens=19, seed=5, top_logprobs=3),
    SamplingParams(max_tokens=21, seed=6, processed_logprobs=True),
    SamplingParams(max_tokens=26, seed=7, top_p=0.8, processed_logprobs=True, return_masks=True),
    SamplingParams(max_tokens=11, seed=8, prompt_logprobs=1),
]
SPECIAL = [SamplingParams(max_tokens=20, seed=9, frequency_penalty=0.5, bad_words=((3,), (4, 5)))]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a round take as long as it may, so that a busy machine changes nothing here."""
    monkeypatch.setattr(model_step, "ROUND_SECONDS", 1e9)


def asked(*sampling: SamplingParams) -> list[Request]:
    return [Request(index, tuple(range(1 + 5 * index)), one) for index, one in enumerate(sampling)]


def words(completion: Completion) -> tuple[object, ...]:
    masks = [mask.tolist() for mask in completion.masks]
    told = (completion.tokens, completion.logprobs, completion.finish_reason, completion.top_logprobs, masks)
    return (*told, completion.prompt, completion.versions)


def looks(engine: Engine, requests: list[Request]) -> tuple[list[Completion], int]:
    """Return the answers, and how many plans it took."""
    plans, advance = [], engine._step.advance

    def noting(plan):  # type: ignore[no-untyped-def]
        plans.append(plan.steps)
        return advance(plan)

    engine._step.advance = noting  # type: ignore[method-assign]
    return engine.generate(requests), len(plans)


@pytest.mark.parametrize("requests", [asked(*PLAIN), asked(*TOLD), asked(*PLAIN, *TOLD, *SPECIAL)])
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_answers_are_those_of_single_steps(tiny_model: Decoder, requests: list[Request], steps: int) -> None:
    found = Engine(tiny_model, EngineConfig(decode_steps=steps)).generate(requests)
    single = Engine(tiny_model, EngineConfig(decode_steps=1)).generate(requests)
    assert [words(one) for one in found] == [words(one) for one in single]
    if len(requests) == len(PLAIN):
        assert "stop" in {one.finish_reason for one in found}


def test_a_round_has_a_step_at_least() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        EngineConfig(decode_steps=0)


def test_there_are_fewer_looks(tiny_model: Decoder) -> None:
    requests = [Request(index, (1, 2, 3), SamplingParams(max_tokens=41, seed=index)) for index in range(3)]
    counts = [looks(Engine(tiny_model, EngineConfig(decode_steps=n)), requests)[1] for n in (1, 4)]
    # One prompt for all, one step that says how long a step takes, ten rounds, and one step of those who came later.
    assert counts == [42, 13]


@pytest.mark.parametrize(("block_size", "blocks"), [(1, 64), (3, 21), (16, 5)])
def test_a_cache_that_is_too_small_for_all_is_used_up_and_given_back(
    tiny_model: Decoder, block_size: int, blocks: int
) -> None:
    sizes = EngineConfig(block_size=block_size, cache_tokens=blocks * block_size, max_sequences=4, decode_steps=5)
    requests = asked(*(SamplingParams(max_tokens=40, seed=seed) for seed in range(4)))
    small = Engine(tiny_model, sizes)
    assert [words(one) for one in small.generate(requests)] == [
        words(one) for one in Engine(tiny_model, EngineConfig(decode_steps=1)).generate(requests)
    ]
    assert small.statistics()["preemptions"] > 0
    assert small.pool.free == blocks


def test_events_of_a_round_tell_its_tokens_one_by_one_up_to_the_end(tiny_model: Decoder) -> None:
    requests = asked(*PLAIN, *TOLD)
    engine = Engine(tiny_model, EngineConfig(decode_steps=4))
    whole = engine.generate(requests)
    for request in requests:
        engine.add(request)
    told: dict[object, list[Event]] = {request.id: [] for request in requests}
    most = 0
    while engine.has_work:
        events = engine.step()
        for event in events:
            told[event.id].append(event)
        most = max(most, sum(event.id == 1 for event in events))
    assert most == 4
    for one in whole:
        own = told[one.id]
        assert [event.tokens for event in own] == [[token] for token in one.tokens]
        assert [event.logprobs for event in own] == [[value] for value in one.logprobs]
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + [one.finish_reason]
        assert [top for event in own for top in event.top_logprobs] == one.top_logprobs
        assert [mask.tolist() for event in own for mask in event.masks] == [mask.tolist() for mask in one.masks]
        assert all(len(event.top_logprobs) == bool(one.top_logprobs) for event in own)
        assert [event.prompt for event in own] == [one.prompt] + [None] * (len(own) - 1)


def test_who_comes_waits_no_longer_than_a_round(tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_step, "ROUND_SECONDS", 1e-9)  # less than any step takes
    _, count = looks(Engine(tiny_model, EngineConfig(decode_steps=4)), asked(SamplingParams(max_tokens=9)))
    assert count == 9


def test_what_comes_with_a_whole_prompt_in_the_cache_is_looked_at(tiny_model: Decoder) -> None:
    """It has one token to compute, as those who decode, and what it may draw depends on what it drew before."""
    prompt = tuple(range(48))
    ask = Request("late", prompt, SamplingParams(max_tokens=12, seed=1, repetition_penalty=1.5, presence_penalty=1.0))
    alone = Engine(tiny_model, EngineConfig(decode_steps=1)).generate([ask])[0]
    engine = Engine(tiny_model, EngineConfig(decode_steps=4, block_size=1))
    engine.add(Request("first", prompt, SamplingParams(max_tokens=60, seed=2)))
    for _ in range(3):
        engine.step()
    engine.add(ask)
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for event in engine.step() if event.id == "late" for token in event.tokens]
    assert tokens == alone.tokens


def test_who_has_gone_hinders_nobody(tiny_model: Decoder) -> None:
    """One with penalties ends; the slot that it had stays empty, and the other one's steps follow each other again."""
    engine = Engine(tiny_model, EngineConfig(decode_steps=4))
    long = Request("long", (1, 2), SamplingParams(max_tokens=60, seed=1))
    alone = Engine(tiny_model, EngineConfig(decode_steps=1)).generate([long])[0]
    asked_both = [long, Request("short", (1, 3), SamplingParams(max_tokens=5, frequency_penalty=0.5, top_logprobs=1))]
    found, plans = looks(engine, asked_both)
    assert words(found[0]) == words(alone)
    assert plans < 25


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_captured_steps_follow_each_other(tiny_model: Decoder, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = stand_in(monkeypatch)
    requests = asked(*PLAIN, *PLAIN)
    engine = Engine(tiny_model, EngineConfig(max_sequences=sequences, graphs=True, decode_steps=4))
    found, count = looks(engine, requests)
    single = Engine(tiny_model, EngineConfig(max_sequences=sequences, decode_steps=1, graphs=False)).generate(requests)
    assert [one.tokens for one in found] == [one.tokens for one in single]
    for one, other in zip(found, single, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert captured["captured"] <= 16
    assert captured["replayed"] > count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_takes_several_steps(tiny_model: Decoder) -> None:
    model = tiny_model.to(torch.accelerator.current_accelerator())
    single, several = (Engine(model, EngineConfig(decode_steps=n)).generate(asked(*PLAIN, *TOLD)) for n in (1, 4))
    assert [one.tokens for one in several] == [one.tokens for one in single]

"""Promises of the engine: one request gets the same answer whatever runs beside it, and nothing leaks."""

import dataclasses

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig, packed_context
from liaoyuan.models.config import Experts
from tests.conftest import randomised

VOCABULARY = 96


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def requests(count: int, seed: int = 0, **sampling: object) -> list[Request]:
    """Requests of different lengths and settings, with their own seeds."""
    made = []
    for index, prompt in enumerate(prompts(count, seed)):
        own = {"max_tokens": 5 + 7 * index % 40, "temperature": (1.0, 0.7, 0.0)[index % 3], "seed": index} | sampling
        made.append(Request(f"r{index}", prompt, SamplingParams(**own)))  # type: ignore[arg-type]
    return made


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def scored(model: Decoder, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of `tokens` after `prompt` by the model's scoring forward."""
    text = torch.tensor([*prompt, *tokens])
    positions, context = packed_context([len(text)])
    with torch.no_grad():
        return model(text, positions, context, targets=text.roll(-1))[len(prompt) - 1 : -1]


def test_log_probabilities_are_those_of_scoring(tiny_model: Decoder) -> None:
    asked = requests(20, top_p=0.9, top_k=40)
    for request, completion in zip(asked, Engine(tiny_model).generate(asked), strict=True):
        expected = scored(tiny_model, request.prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_the_batch(tiny_model: Decoder) -> None:
    asked = requests(20)
    together = Engine(tiny_model).generate(asked)
    engine = Engine(tiny_model, EngineConfig(max_sequences=1))
    assert tokens_of(together) == [engine.generate([request])[0].tokens for request in asked]
    assert len({tuple(tokens) for tokens in tokens_of(together)}) == 20


def test_equal_prompts_with_different_seeds_differ_and_repeat(tiny_model: Decoder) -> None:
    asked = [Request(index, (1, 2, 3), SamplingParams(max_tokens=20)) for index in range(16)]
    engine = Engine(tiny_model)
    first = tokens_of(engine.generate(asked))
    assert len({tuple(tokens) for tokens in first}) == 16
    assert tokens_of(engine.generate(asked)) == first


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 40])
def test_equal_prompts_are_computed_once(tiny_model: Decoder, length: int) -> None:
    prompt = tuple(range(length))
    asked = [Request(index, prompt, SamplingParams(max_tokens=10, seed=index)) for index in range(8)]
    engine = Engine(tiny_model)
    together = tokens_of(engine.generate(asked))
    assert engine.statistics()["computed_tokens"] == length + 7 + 8 * 9
    engine = Engine(tiny_model, EngineConfig(max_sequences=1))
    assert together == [engine.generate([request])[0].tokens for request in asked]


def test_who_waits_for_an_aborted_prompt_computes_it(tiny_model: Decoder) -> None:
    asked = [Request(index, tuple(range(40)), SamplingParams(max_tokens=5, temperature=0.0)) for index in range(3)]
    expected = Engine(tiny_model).generate(asked[:1])[0].tokens
    engine = Engine(tiny_model, EngineConfig(max_sequences=4, max_batch_tokens=16))
    told: dict[object, list[int]] = {}
    for request in asked:
        engine.add(request)
    engine.step()
    engine.abort(0)
    while engine.has_work:
        for event in engine.step():
            told.setdefault(event.id, []).extend(event.tokens)
    assert told == {1: expected, 2: expected}


@pytest.mark.parametrize("budget", [1, 3, 16, 17])
def test_chunked_prefill_equals_whole(tiny_model: Decoder, budget: int) -> None:
    asked = requests(6)
    whole = Engine(tiny_model).generate(asked)
    chunked = Engine(tiny_model, EngineConfig(max_sequences=min(4, budget), max_batch_tokens=budget)).generate(asked)
    assert tokens_of(chunked) == tokens_of(whole)


def test_preemption_gives_the_same_tokens(tiny_model: Decoder) -> None:
    asked = requests(12, max_tokens=40)
    asked += [Request(f"twin{index}", asked[0].prompt, asked[index].sampling) for index in range(4)]
    engine = Engine(tiny_model, EngineConfig(cache_tokens=160, max_sequences=8))
    assert tokens_of(engine.generate(asked)) == tokens_of(Engine(tiny_model).generate(asked))
    assert engine.statistics()["preemptions"] > 0
    assert engine.statistics()["free_blocks"] == engine.statistics()["blocks"] == 10


def test_slots_are_refilled_as_sequences_end(tiny_model: Decoder) -> None:
    asked = requests(30)
    engine = Engine(tiny_model, EngineConfig(max_sequences=4))
    assert tokens_of(engine.generate(asked)) == tokens_of(Engine(tiny_model).generate(asked))
    needed = sum(request.sampling.max_tokens or 0 for request in asked)
    assert engine.statistics()["generated_tokens"] == needed
    assert engine.statistics()["steps"] < needed / 2


def test_a_stop_token_ends_the_completion_and_is_in_it(tiny_model: Decoder) -> None:
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=30, temperature=0.0))
    engine = Engine(tiny_model)
    whole = engine.generate([request])[0]
    stop = whole.tokens[11]
    place = whole.tokens.index(stop)
    sampling = dataclasses.replace(request.sampling, stop_token_ids=(VOCABULARY - 1, stop))
    stopped = engine.generate([Request("b", request.prompt, sampling)])[0]
    assert (stopped.tokens, stopped.finish_reason) == (whole.tokens[: place + 1], "stop")
    assert (len(whole.tokens), whole.finish_reason) == (30, "length")


def test_steps_tell_what_generate_tells(tiny_model: Decoder) -> None:
    asked = requests(9, top_logprobs=3)
    expected = Engine(tiny_model).generate(asked)
    engine = Engine(tiny_model)
    told: dict[object, list] = {}
    for request in asked:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            told.setdefault(event.id, []).append(event)
    for completion in expected:
        events = told[completion.id]
        assert [token for event in events for token in event.tokens] == completion.tokens
        assert [value for event in events for value in event.logprobs] == completion.logprobs
        assert [top for event in events for top in event.top_logprobs] == completion.top_logprobs
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [completion.finish_reason]


def test_top_log_probabilities_hold_the_greedy_token_first(tiny_model: Decoder) -> None:
    asked = [Request("a", (5, 6), SamplingParams(max_tokens=12, temperature=0.0, top_logprobs=4))]
    completion = Engine(tiny_model).generate(asked)[0]
    for token, logprob, top in zip(completion.tokens, completion.logprobs, completion.top_logprobs, strict=True):
        assert len(top) == 4
        assert top[0][0] == token
        assert top[0][1] == pytest.approx(logprob, abs=1e-5)
        assert sorted((value for _, value in top), reverse=True) == [value for _, value in top]


def test_abort_frees_blocks_and_leaves_the_others(tiny_model: Decoder) -> None:
    asked = requests(8, max_tokens=20)
    expected = {completion.id: completion.tokens for completion in Engine(tiny_model).generate(asked)}
    engine = Engine(tiny_model, EngineConfig(max_sequences=4))
    told: dict[object, list[int]] = {}
    for request in asked:
        engine.add(request)
    for _ in range(5):
        engine.step()
    before = engine.statistics()["free_blocks"]
    assert engine.abort("r1")  # runs
    assert engine.statistics()["free_blocks"] > before
    assert engine.abort("r6")  # waits
    assert not engine.abort("r6")
    while engine.has_work:
        for event in engine.step():
            told.setdefault(event.id, []).extend(event.tokens)
    assert told.keys() == expected.keys() - {"r1", "r6"}
    assert all(expected[name][-len(tokens) :] == tokens for name, tokens in told.items())
    assert engine.statistics()["free_blocks"] == engine.statistics()["blocks"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((1,) * 250, SamplingParams(max_tokens=7), "257 tokens .* at most 256 fit"),
        ((1,) * 256, SamplingParams(max_tokens=None), "257 tokens"),
        ((), SamplingParams(), "empty"),
        ((1, VOCABULARY), SamplingParams(), f"token {VOCABULARY}"),
        ((1, -1), SamplingParams(), "token -1"),
        ((1,), SamplingParams(max_tokens=0), "max_tokens"),
        ((1,), SamplingParams(top_p=0.0), "top_p"),
        ((1,), SamplingParams(temperature=float("nan")), "temperature"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_model: Decoder, prompt: tuple[int, ...], sampling: SamplingParams, message: str
) -> None:
    engine = Engine(tiny_model)
    with pytest.raises(LiaoyuanError, match=message):
        engine.generate([Request("good", (1, 2)), Request("bad", prompt, sampling)])
    assert not engine.has_work


def test_what_exceeds_the_cache_is_refused(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(cache_tokens=64))
    with pytest.raises(LiaoyuanError, match="at most 64 fit"):
        engine.add(Request("a", (1,) * 60, SamplingParams(max_tokens=5)))
    fits = Request("a", (1,) * 60, SamplingParams(max_tokens=None, temperature=0.0))
    assert len(engine.generate([fits])[0].tokens) == 4


def test_weights_may_change_between_calls(tiny_config: ModelConfig) -> None:
    model, other = randomised(tiny_config, 0), randomised(tiny_config, 7)
    asked = requests(5)
    engine = Engine(model)
    engine.generate(asked)
    model.load_state_dict(other.state_dict())
    assert tokens_of(engine.generate(asked)) == tokens_of(Engine(other).generate(asked))


def test_mixture_of_experts(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, model_type="qwen3_moe", experts=Experts(4, 2, 24))
    model = randomised(config, 3)
    asked = requests(10)
    for request, completion in zip(asked, Engine(model).generate(asked), strict=True):
        expected = scored(model, request.prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_whoever_wants_it_is_told_how_his_prompt_is_read(tiny_model: Decoder) -> None:
    prompt = tuple(range(1, 60))
    asked = Request("a", prompt, SamplingParams(max_tokens=3, temperature=0.0), progress=True)
    plain = dataclasses.replace(asked, id="b", prompt=prompt[::-1], progress=False)
    engine = Engine(tiny_model, EngineConfig(max_batch_tokens=16, max_sequences=2))
    for repeated, reads in ((0, [0, 16, 32, 48, 59]), (1, [48, 59])):  # the second time whole blocks are in the cache
        engine.add(dataclasses.replace(asked, id=repeated))
        events = []
        while engine.has_work:
            events += engine.step()
        told = [event for event in events if event.read is not None]
        assert [event.read for event in told] == reads and {event.cached_tokens for event in told} == {reads[0]}
        assert all(not event.tokens for event in told)
        assert [token for event in events for token in event.tokens] == Engine(tiny_model).generate([asked])[0].tokens
        assert all(event.waited > 0 for event in events)
    engine.add(plain)
    assert all(event.read is None for _ in range(20) for event in engine.step())

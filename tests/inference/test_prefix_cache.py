"""Promises of the prefix cache: what was computed once is not computed again, and nobody reads what is not his."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as draw

from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.blocks import BlockPool
from liaoyuan.models import Decoder

PROMPT = tuple(range(40))
GREEDY = SamplingParams(max_tokens=5, temperature=0.0)


def run(engine: Engine, *requests: Request) -> dict[object, list[int]]:
    """Run requests as a server does, all at once."""
    told: dict[object, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.can_step:
        for event in engine.step():
            told[event.id] += event.tokens
    return told


def computed(engine: Engine, *requests: Request) -> int:
    """Return how many tokens the engine computes for requests."""
    before = engine.statistics()["computed_tokens"]
    run(engine, *requests)
    return engine.statistics()["computed_tokens"] - before


def test_a_prompt_that_was_answered_is_not_computed_again(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model)
    assert computed(engine, Request(0, PROMPT, GREEDY)) == 40 + 4
    assert computed(engine, Request(1, PROMPT, GREEDY)) == 8 + 4  # two of three blocks of 16 are full
    assert computed(engine, Request(2, (*PROMPT, 9, 9), GREEDY)) == 10 + 4


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model)
    long = dataclasses.replace(GREEDY, max_tokens=30)
    answer = run(engine, Request(0, PROMPT, long))[0]
    assert computed(engine, Request(1, (*PROMPT, *answer, 5, 6), GREEDY)) == 72 - 64 + 4


def test_hits_change_no_answer(tiny_model: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    tails = [tuple(torch.randint(96, (n,), generator=generator).tolist()) for n in range(1, 40, 3)]
    asked = [
        Request(index, PROMPT + tail, SamplingParams(max_tokens=9, seed=index)) for index, tail in enumerate(tails)
    ]
    alone = [Engine(tiny_model).generate([request])[0] for request in asked]
    engine = Engine(tiny_model)
    run(engine, *asked[::-1])
    again = engine.generate(asked, keep_prefixes=True)
    assert [one.tokens for one in again] == [one.tokens for one in alone]
    assert all(one.cached_tokens >= 32 for one in again)
    assert engine.statistics()["prefix_hit_tokens"] >= 32 * len(asked)


@pytest.mark.parametrize("other", [{"salt": "b"}, {"salt": "a\0b"}])
def test_other_salts_share_nothing(tiny_model: Decoder, other: dict[str, str]) -> None:
    engine = Engine(tiny_model)
    run(engine, Request(0, PROMPT, GREEDY, salt="a"))
    assert computed(engine, Request(1, PROMPT, GREEDY, **other)) == 44  # type: ignore[arg-type]
    assert computed(engine, Request(2, PROMPT, GREEDY, salt="a")) == 12


def test_prompts_that_begin_alike_and_come_at_once_are_computed_once(tiny_model: Decoder) -> None:
    asked = [Request(index, (*PROMPT[:35], 50 + index), GREEDY) for index in range(6)]
    engine = Engine(tiny_model)
    assert computed(engine, *asked) == 36 + 5 * 4 + 6 * 4
    assert run(engine, *asked) == {request.id: run(Engine(tiny_model), request)[request.id] for request in asked}


def test_who_computes_for_others_may_leave(tiny_model: Decoder) -> None:
    expected = run(Engine(tiny_model), Request(0, PROMPT, GREEDY))[0]
    engine = Engine(tiny_model, EngineConfig(max_sequences=4, max_batch_tokens=20))
    for index in range(4):
        engine.add(Request(index, (*PROMPT[: 39 - index % 2 * 3], *PROMPT[39 - index % 2 * 3 :]), GREEDY))
    engine.step()
    engine.abort(0)
    told: dict[object, list[int]] = {}
    while engine.can_step:
        for event in engine.step():
            told.setdefault(event.id, []).extend(event.tokens)
    assert told == {1: expected, 2: expected, 3: expected}


def test_the_block_that_was_used_longest_ago_goes_first(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(cache_tokens=128, max_sequences=2))
    first, second = (Request(index, tuple(range(index, index + 40)), GREEDY) for index in range(2))
    run(engine, first)
    run(engine, second)
    assert computed(engine, dataclasses.replace(first, id=2)) == 12
    assert computed(engine, Request(3, tuple(range(50, 90)), dataclasses.replace(GREEDY, max_tokens=40))) == 79
    assert computed(engine, dataclasses.replace(first, id=5)) == 12
    assert computed(engine, dataclasses.replace(second, id=4)) == 28  # the end of it made room for the fifth block
    assert engine.statistics()["free_blocks"] == 8


def test_the_cache_can_be_switched_off(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(prefix_cache=False))
    assert computed(engine, Request(0, PROMPT, GREEDY)) == computed(engine, Request(1, PROMPT, GREEDY)) == 44
    assert engine.statistics()["cached_blocks"] == 0


@examples(max_examples=60)
@given(draw.lists(draw.tuples(draw.sampled_from(["take", "share", "give", "remember", "forget"]), draw.integers(0, 9))))
def test_a_pool_never_loses_a_block(steps: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(12), []
    for what, number in steps:
        if what == "take" and number <= pool.free:
            held.append(pool.take(number))
        elif what == "share" and (found := pool.find([bytes([index]) for index in range(number)])).size:
            pool.share(found)
            held.append(found)
        elif what == "give" and held:
            pool.give(held.pop(number % len(held)))
        elif what == "remember" and held and len(held[-1]):
            pool.remember(bytes([number]), int(held[-1][0]))
        elif what == "forget":
            pool.forget()
        pool.check(np.concatenate([*held, np.empty(0, dtype=np.int32)]))
    for blocks in held:
        pool.give(blocks)
    assert pool.free == 12


def test_a_leak_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2)
    with pytest.raises(AssertionError, match="leaked"):
        pool.check(blocks[:1])

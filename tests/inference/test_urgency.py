"""Who is served when not all can be: priorities, fair shares between keys, and time that runs out."""

import pytest

from liaoyuan.inference import Engine, EngineConfig, Event, Request, SamplingParams
from liaoyuan.models import Decoder

TEN = SamplingParams(max_tokens=10, temperature=0.0)


def finish_order(engine: Engine) -> list[object]:
    order = []
    while engine.can_step:
        order += [event.id for event in engine.step() if event.finish_reason]
    return order


def test_the_urgent_go_first(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(max_sequences=1))
    for name, priority in (("late", 5), ("first", -1), ("second", 0)):
        engine.add(Request(name, (1, 2, 3), TEN, priority=priority))
    assert finish_order(engine) == ["first", "second", "late"]


def test_the_urgent_take_the_place_of_others_which_lose_nothing(tiny_model: Decoder) -> None:
    expected = Engine(tiny_model).generate([Request("patient", (4, 5), TEN)])[0].tokens
    engine = Engine(tiny_model, EngineConfig(max_sequences=1, decode_steps=1))
    engine.add(Request("patient", (4, 5), TEN, priority=1))
    told = [token for _ in range(4) for event in engine.step() for token in event.tokens]
    engine.add(Request("urgent", (1, 2, 3), TEN))
    order = []
    while engine.can_step:
        for event in engine.step():
            told += event.tokens if event.id == "patient" else []
            order += [event.id] if event.finish_reason else []
    assert order == ["urgent", "patient"]
    assert told == expected


def test_keys_get_equal_shares(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(max_sequences=2, decode_steps=1))
    for index in range(12):
        engine.add(Request(f"many{index}", (1, 2, index), TEN, key="many"))
    for index in range(3):
        engine.add(Request(f"few{index}", (3, 2, index), TEN, key="few"))
    order = finish_order(engine)
    assert max(order.index(f"few{index}") for index in range(3)) <= 7
    assert [name for name in order if str(name).startswith("many")] == [f"many{index}" for index in range(12)]


def test_a_key_saves_nothing_up_while_it_is_idle(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(max_sequences=1, decode_steps=1))
    for index in range(8):
        engine.add(Request(f"busy{index}", (1, 2, index), TEN, key="busy"))
    for _ in range(45):  # four and a half of the busy one's
        engine.step()
    for index in range(3):
        engine.add(Request(f"new{index}", (3, 2, index), TEN, key="new"))
    order = finish_order(engine)
    assert order.index("busy5") < order.index("new1")  # they take turns


def test_time_runs_out_where_it_is(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model, EngineConfig(max_sequences=1))
    endless = SamplingParams(max_tokens=200, temperature=0.0)
    engine.add(Request("runs", (1, 2), endless, timeout=1e-9))
    engine.add(Request("waits", (1, 2), endless, timeout=1e-9))
    engine.add(Request("free", (1, 2), TEN))
    events: list[Event] = []
    while engine.can_step:
        events += engine.step()
    ends = {event.id: event.finish_reason for event in events if event.finish_reason}
    assert ends == {"runs": "timeout", "waits": "timeout", "free": "length"}
    assert engine.statistics()["free_blocks"] == engine.statistics()["blocks"]


def test_a_time_that_suffices_changes_nothing(tiny_model: Decoder) -> None:
    asked, engine = Request("a", (1, 2), TEN, timeout=1000.0), Engine(tiny_model)
    assert engine.generate([asked])[0].finish_reason == "length"


@pytest.mark.parametrize("sequences", [1, 3])
def test_generate_tells_whose_time_was_over(tiny_model: Decoder, sequences: int) -> None:
    asked = [
        Request(index, (1, 2), SamplingParams(max_tokens=99), timeout=[None, 1e-9][index % 2]) for index in range(4)
    ]
    done = Engine(tiny_model, EngineConfig(max_sequences=sequences)).generate(asked)
    assert [one.finish_reason for one in done] == ["length", "timeout"] * 2

"""An engine between weights: every change of state succeeds or raises, and none leaves garbage."""

import dataclasses
from pathlib import Path

import pytest
import torch

from liaoyuan.checkpoint import save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Event, Request, SamplingParams
from liaoyuan.models import Decoder, ModelConfig
from tests.conftest import randomised

TWENTY = SamplingParams(max_tokens=20, temperature=0.0)


def begun(model: Decoder, steps: int = 5) -> tuple[Engine, list[Event]]:
    engine = Engine(model, EngineConfig(max_sequences=2, decode_steps=1))
    for index in range(3):
        engine.add(Request(index, (1, 2, 3 + index), TWENTY))
    return engine, [event for _ in range(steps) for event in engine.step()]


def rest(engine: Engine) -> list[Event]:
    events = []
    while engine.can_step:
        events += engine.step()
    return events


def tokens_of(events: list[Event], name: object) -> list[int]:
    return [token for event in events if event.id == name for token in event.tokens]


def answers(model: Decoder) -> list[list[int]]:
    asked = [Request(index, (1, 2, 3 + index), TWENTY) for index in range(3)]
    return [one.tokens for one in Engine(model).generate(asked)]


def test_keep_freezes_and_goes_on(tiny_model: Decoder) -> None:
    engine, events = begun(tiny_model)
    engine.pause("keep")
    assert not engine.can_step
    assert engine.step() == []
    engine.add(Request("new", (1, 2, 3), TWENTY))
    engine.resume()
    events += rest(engine)
    assert [tokens_of(events, index) for index in range(3)] == answers(tiny_model)
    assert tokens_of(events, "new") == answers(tiny_model)[0]


def test_abort_ends_all_and_tells_them(tiny_model: Decoder) -> None:
    engine, _ = begun(tiny_model)
    engine.pause("abort")
    assert {event.id: event.finish_reason for event in rest(engine)} == dict.fromkeys(range(3), "abort")
    assert engine.statistics()["free_blocks"] == engine.statistics()["blocks"]


def test_wait_lets_those_end_that_run(tiny_model: Decoder) -> None:
    engine, _ = begun(tiny_model)
    engine.pause("wait")
    assert engine.state == "draining"
    ended = [event.id for event in rest(engine) if event.finish_reason]
    assert (ended, engine.state, engine.has_work) == ([0, 1], "paused", True)
    engine.resume()
    assert [event.id for event in rest(engine) if event.finish_reason] == [2]


@pytest.mark.parametrize("drop", [False, True])
def test_sleep_gives_memory_back_and_wakes_with_the_same_answers(tiny_model: Decoder, drop: bool) -> None:
    expected, state = answers(tiny_model), {name: x.clone() for name, x in tiny_model.state_dict().items()}
    engine, events = begun(tiny_model)
    engine.sleep(without_weights=drop)
    assert sum(piece.untyped_storage().nbytes() for piece in tiny_model.parameters()) == 0 or not drop
    with pytest.raises(LiaoyuanError, match="asleep"):
        engine.resume()
    with pytest.raises(LiaoyuanError, match="asleep"):
        engine.update_weights(state)
    engine.wake()
    if drop:
        with pytest.raises(LiaoyuanError, match="no weights"):
            engine.resume()
        with pytest.raises(LiaoyuanError, match="lacks"):
            engine.update_weights({name: state[name] for name in list(state)[1:]})
        engine.update_weights(state)
    engine.resume()
    events += rest(engine)
    assert [tokens_of(events, index) for index in range(3)] == expected


def test_new_weights_in_mid_answer_are_used_from_there_on(tiny_config: ModelConfig) -> None:
    model, other = randomised(tiny_config, 0), randomised(tiny_config, 9)
    engine, events = begun(model, steps=6)
    assert engine.update_weights(dict(other.state_dict())) == 1
    events += rest(engine)
    for name in range(2):
        made = [event for event in events if event.id == name]
        assert [event.version for event in made] == [0] * 6 + [1] * 14
        prompt = (1, 2, 3 + name, *(event.tokens[0] for event in made[:6]))
        asked = Request("a", prompt, dataclasses.replace(TWENTY, max_tokens=14))
        assert tokens_of(made[6:], name) == Engine(other).generate([asked])[0].tokens
    assert engine.checksum() == Engine(other).checksum()


def test_generate_tells_the_version_of_each_token(tiny_config: ModelConfig) -> None:
    engine = Engine(randomised(tiny_config, 0))
    engine.update_weights(dict(randomised(tiny_config, 1).state_dict()), version=7)
    assert engine.generate([Request("a", (1, 2), TWENTY)])[0].versions == [7] * 20


def test_weights_come_from_a_folder(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model, other = randomised(tiny_config, 0), randomised(tiny_config, 9)
    save_model(other, tmp_path / "new")
    engine = Engine(model)
    before = engine.checksum()
    engine.update_weights(tmp_path / "new")
    assert engine.checksum() == Engine(other).checksum() != before
    torn = tmp_path / "new" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(LiaoyuanError):
        engine.update_weights(tmp_path / "new")
    assert engine.checksum() == Engine(other).checksum()
    assert engine.state == "ready"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"nrm.weight": state["norm.weight"]}, "did you mean 'norm.weight'"),
        (lambda state: state | {"norm.weight": torch.ones(3)}, "is \\[3\\]"),
        (lambda state: state | {"norm.weight": torch.full((32,), torch.nan)}, "not numbers"),
    ],
)
def test_a_wrong_update_changes_nothing(tiny_config: ModelConfig, spoil: object, message: str) -> None:
    model, other = randomised(tiny_config, 0), randomised(tiny_config, 9)
    engine, events = begun(model)
    before = engine.checksum()
    with pytest.raises(LiaoyuanError, match=message):
        engine.update_weights(spoil(dict(other.state_dict())))  # type: ignore[operator]
    assert (engine.checksum(), engine.version, engine.state) == (before, 0, "ready")
    events += rest(engine)
    assert [tokens_of(events, index) for index in range(3)] == answers(model)


def test_an_update_that_fails_in_the_middle_breaks_the_engine_until_a_whole_one(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, events = begun(randomised(tiny_config, 0))
    other = dict(randomised(tiny_config, 9).state_dict())

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("liaoyuan.inference.spread.memory.copy_weights", fails)
        with pytest.raises(MemoryError):
            engine.update_weights(other)
    assert engine.state == "broken"
    assert not engine.can_step
    for change in (engine.resume, engine.pause, engine.sleep):
        with pytest.raises(LiaoyuanError, match="broken"):
            change()
    engine.update_weights(other)
    engine.resume()
    assert len(tokens_of(events + rest(engine), 0)) == 20

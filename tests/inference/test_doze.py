"""An engine that nobody asks goes to sleep, and the next request finds it as it was."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineThread, Request, SamplingParams
from liaoyuan.models import Decoder

ASKED = Request("a", (1, 2, 3), SamplingParams(max_tokens=12, seed=5))
SOON = 0.02  # seconds


async def answered(runner: EngineThread, name: str) -> list[int]:
    request = dataclasses.replace(ASKED, id=name)
    return [token async for event in runner.stream(request) for token in event.tokens]


async def asleep(runner: EngineThread) -> None:
    async with asyncio.timeout(20):
        while not runner.health()["dozing"]:
            await asyncio.sleep(0)


def size(engine: Engine) -> int:
    return sum(tensor.numel() for tensor in engine.model.state_dict().values())


@pytest.fixture
def folder(tiny_model: Decoder, tmp_path: Path) -> Path:
    save_model(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_memory_is_given_back_and_the_next_answer_is_the_same(folder: Path) -> None:
    engine = Engine(load_model(folder))

    async def main(runner: EngineThread) -> None:
        first = await answered(runner, "first")
        for name in ("second", "third"):
            await asleep(runner)
            assert size(engine) == 0 and engine.state == "asleep"
            with pytest.raises(LiaoyuanError, match="asleep"):
                _ = engine.cache
            assert await answered(runner, name) == first and engine.version == 0

    with EngineThread(engine, sleep_after=SOON, weights=folder) as runner:
        asyncio.run(main(runner))


def test_weights_that_were_changed_are_kept(folder: Path, tiny_model: Decoder) -> None:
    engine = Engine(load_model(folder))
    thread = EngineThread(engine, sleep_after=SOON, weights=folder)
    engine.update_weights({name: value * 1.5 for name, value in tiny_model.state_dict().items()}, version=0)
    changed = engine.checksum()

    async def main(runner: EngineThread) -> None:
        await asleep(runner)
        assert size(engine) > 0
        assert len(await answered(runner, "next")) == 12
        assert engine.checksum() == changed

    with thread as runner:
        asyncio.run(main(runner))


def test_who_was_put_to_sleep_by_somebody_is_not_woken_by_a_request(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model)

    async def main(runner: EngineThread) -> None:
        await runner.call(lambda engine: engine.sleep())
        runner.rouse()
        waiting = asyncio.create_task(answered(runner, "waits"))
        assert await runner.call(lambda engine: engine.state) == "asleep" and not runner.health()["dozing"]
        await runner.call(lambda engine: (engine.wake(), engine.resume()))
        assert len(await waiting) == 12

    with EngineThread(engine, sleep_after=3600.0) as runner:
        asyncio.run(main(runner))


def test_a_folder_that_is_gone_fails_the_request_and_not_the_server(folder: Path) -> None:
    engine = Engine(load_model(folder))

    async def main(runner: EngineThread) -> None:
        await asleep(runner)
        weights, elsewhere = folder / "model.safetensors", folder / "away"
        weights.rename(elsewhere)
        with pytest.raises(LiaoyuanError, match="safetensors"):
            await answered(runner, "fails")
        elsewhere.rename(weights)
        assert len(await answered(runner, "works")) == 12

    with EngineThread(engine, sleep_after=SOON, weights=folder) as runner:
        asyncio.run(main(runner))

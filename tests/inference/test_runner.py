"""The engine behind asynchronous clients: they get their tokens, and those who leave cost nothing."""

import asyncio
import dataclasses

import pytest
import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Busy, Engine, EngineConfig, EngineThread, Request, SamplingParams
from liaoyuan.models import Decoder


def request(name: str, count: int = 20) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=count, seed=len(name)))


async def collect(runner: EngineThread, wanted: Request) -> list[int]:
    return [token async for event in runner.stream(wanted) for token in event.tokens]


async def settled(engine: Engine) -> dict[str, int]:
    """Wait until the engine has nothing to do and its thread has put away what it did last; a hang is the failure of
    the test.
    """
    async with asyncio.timeout(20):
        while engine.has_work or engine.statistics()["free_blocks"] < engine.statistics()["blocks"]:
            await asyncio.sleep(0)
    return engine.statistics()


def test_clients_get_what_generate_gives(tiny_model: Decoder) -> None:
    asked = [request("r" * n, 10 + n) for n in range(1, 9)]
    expected = [completion.tokens for completion in Engine(tiny_model).generate(asked)]

    async def main(runner: EngineThread) -> list[list[int]]:
        return await asyncio.gather(*(collect(runner, wanted) for wanted in asked))

    with EngineThread(Engine(tiny_model)) as runner:
        assert asyncio.run(main(runner)) == expected
        assert asyncio.run(main(runner)) == expected  # another event loop


def test_a_client_that_leaves_frees_its_blocks(tiny_model: Decoder) -> None:
    engine = Engine(tiny_model)

    async def main(runner: EngineThread) -> None:
        stream = runner.stream(request("leaves", 250))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(collect(runner, request("cancelled", 250)))
        while not engine.has_work:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        statistics = await settled(engine)
        assert statistics["free_blocks"] == statistics["blocks"]
        assert statistics["generated_tokens"] < 400
        assert runner.health()["open"] == 0

    with EngineThread(engine) as runner:
        asyncio.run(main(runner))


def test_bad_requests_and_a_full_queue_are_refused_at_once(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        with pytest.raises(LiaoyuanError, match="at most 256 fit"):
            runner.stream(request("long", 1000))
        runs = runner.stream(request("a", 250))
        await anext(runs)
        waits = asyncio.create_task(collect(runner, request("b")))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            runner.stream(request("c"))
        await runs.aclose()  # type: ignore[attr-defined]
        assert len(await waits) == 20
        assert len(await collect(runner, request("c"))) == 20

    with EngineThread(Engine(tiny_model, EngineConfig(max_sequences=1)), max_queued=1) as runner:
        asyncio.run(main(runner))


def test_two_requests_of_one_name(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        results = await asyncio.gather(*(collect(runner, request("same")) for _ in range(2)), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["LiaoyuanError", "list"]

    with EngineThread(Engine(tiny_model)) as runner:
        asyncio.run(main(runner))


def test_a_failing_step_gives_up_its_requests_and_the_loop_lives(
    tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model)

    async def main(runner: EngineThread) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(tiny_model, "forward", lambda *_, **__: torch.zeros(1)[7])
            with pytest.raises(LiaoyuanError, match="engine failed"):
                await collect(runner, request("unlucky"))
        assert len(await collect(runner, request("lucky"))) == 20
        assert (runner.health()["failures"], runner.health()["alive"]) == (1, True)
        assert engine.statistics()["free_blocks"] == engine.statistics()["blocks"]

    with EngineThread(engine) as runner:
        asyncio.run(main(runner))


def test_closing_ends_open_streams(tiny_model: Decoder) -> None:
    async def main() -> None:
        with EngineThread(Engine(tiny_model)) as runner:
            stream = runner.stream(request("open", 250))
            await anext(stream)
        with pytest.raises(LiaoyuanError, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(LiaoyuanError, match="not running"):
            await collect(runner, request("late"))

    asyncio.run(main())


def test_pausing_waits_for_those_that_run_and_keeps_the_rest(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        running = asyncio.create_task(collect(runner, request("runs", 60)))
        while not runner.health()["running"]:
            await asyncio.sleep(0)
        late = asyncio.create_task(collect(runner, request("late", 5)))
        await runner.pause("wait")
        assert len(await running) == 60
        assert not late.done()
        await runner.call(Engine.resume)
        assert len(await late) == 5

    with EngineThread(Engine(tiny_model, EngineConfig(max_sequences=1))) as runner:
        asyncio.run(main(runner))


def test_aborted_requests_say_so(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        stream = runner.stream(request("a", 250))
        await anext(stream)
        await runner.pause("abort")
        reasons = [event.finish_reason async for event in stream]
        assert reasons[-1] == "abort"

    with EngineThread(Engine(tiny_model)) as runner:
        asyncio.run(main(runner))


def test_work_between_two_steps_returns_or_raises(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        assert await runner.call(lambda engine: engine.version) == 0
        with pytest.raises(LiaoyuanError, match="no weight 'x'"):
            await runner.call(lambda engine: engine.update_weights({"x": torch.ones(1)}))
        assert len(await collect(runner, request("goes on"))) == 20

    with EngineThread(Engine(tiny_model)) as runner:
        asyncio.run(main(runner))
    with pytest.raises(LiaoyuanError, match="not running"):
        asyncio.run(main(runner))


def test_time_runs_out_while_paused(tiny_model: Decoder) -> None:
    async def main(runner: EngineThread) -> None:
        await runner.pause()
        stream = runner.stream(dataclasses.replace(request("a"), timeout=0.01))
        async with asyncio.timeout(20):
            assert [event.finish_reason async for event in stream] == ["timeout"]

    with EngineThread(Engine(tiny_model)) as runner:
        asyncio.run(main(runner))

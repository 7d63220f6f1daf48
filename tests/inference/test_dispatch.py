"""Promises of who hands requests to prefill and decode workers: all that a request asks for travels, nothing is handed
over twice, and whoever cannot be answered is told why.
"""

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.inference import Engine, Request, SamplingParams
from liaoyuan.inference.disaggregation.dispatch import Dispatch, operate, tell
from liaoyuan.inference.disaggregation.frames import put_frame
from liaoyuan.inference.operations import Pause, Resume
from liaoyuan.inference.runner import Busy, Unavailable
from liaoyuan.models import Decoder
from tests.inference.adapter_files import write_adapter
from tests.inference.test_disaggregation import CONFIG, PROMPT, Side, alone, answer, request, side, together


def test_masks_and_scores_travel(tiny_model: Decoder) -> None:
    sampling = SamplingParams(max_tokens=6, seed=5, top_k=4, return_masks=True, prompt_logprobs=2)
    asked = Request("a", PROMPT, sampling)
    expected = Engine(tiny_model, CONFIG).generate([asked])[0]

    async def test(prefill: Side, decode: Side) -> None:
        events = [event async for event in Dispatch([decode.socket], [prefill.socket]).stream(asked)]
        masks = [mask.tolist() for event in events for mask in event.masks]
        assert masks == [mask.tolist() for mask in expected.masks] and len(masks) == 6
        assert [event.prompt for event in events if event.prompt] == [expected.prompt]

    together(tiny_model, test)


def test_a_prompt_that_several_ask_for_at_once_is_handed_over_once(tiny_model: Decoder) -> None:
    asked = [request(f"r{n}", seed=n) for n in range(4)]
    expected = [alone(tiny_model, one) for one in asked]

    async def test(prefill: Side, decode: Side) -> None:
        front = Dispatch([decode.socket], [prefill.socket])
        assert await asyncio.gather(*(answer(front, one) for one in asked)) == expected
        assert decode.worker.counts["blocks_received"] == prefill.worker.counts["blocks_sent"] == 9

    together(tiny_model, test)


def test_what_was_computed_for_a_request_was_in_no_cache(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        front, cached = Dispatch([decode.socket], [prefill.socket]), []
        for prompt in (PROMPT, PROMPT, PROMPT[:100] + PROMPT[:50]):
            events = [event async for event in front.stream(request(prompt=prompt))]
            cached.append(events[0].cached_tokens)
        assert cached == [0, 144, 96]

    together(tiny_model, test)


def test_prompts_of_an_adapter_are_handed_over_if_it_is_the_same_one(tmp_path: Path, tiny_model: Decoder) -> None:
    save_model(tiny_model, tmp_path / "base")
    own, other = (write_adapter(tmp_path / str(seed), tmp_path / "base", seed=seed) for seed in range(2))

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            models = [load_model(tmp_path / "base") for _ in range(3)]  # an adapter is put into its model
            async with side(models[0], Path(folder), "p") as prefill, side(models[1], Path(folder), "d") as decode:
                front, single = Dispatch([decode.socket], [prefill.socket]), Engine(models[2], CONFIG)
                for engine in (decode.engine, single):
                    engine.load_adapter("x", own)
                for place, prompt, sent in ((own, PROMPT, 9), (other, PROMPT[::-1], 9)):
                    prefill.engine.load_adapter("x", place)
                    asked = replace(request(prompt=prompt), adapter="x")
                    done = single.generate([asked])[0]
                    assert await answer(front, asked) == (done.tokens, done.logprobs, done.finish_reason)
                    assert prefill.worker.counts["blocks_sent"] == sent
                    await prefill.rests()
                    prefill.engine.unload_adapter("x")

    asyncio.run(run())


def test_who_is_full_is_passed_over_and_when_all_are_that_is_said(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        front = Dispatch([prefill.socket, decode.socket])
        await asyncio.gather(*(operate(one.socket, Pause()) for one in (prefill, decode)))
        streams = [front.stream(request(f"r{n}", PROMPT[:4])) for n in range(2 * (8 + 256))]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        async with asyncio.timeout(60):
            while sum([(await tell(one.socket))["open"] for one in (prefill, decode)]) < len(streams):
                await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="The server is busy"):
            await answer(front, request())
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(operate(one.socket, Resume()) for one in (prefill, decode)))

    together(tiny_model, test)


def test_a_pause_that_aborts_ends_who_waits_for_his_prompt_too(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        await operate(prefill.socket, Pause())
        asked = asyncio.ensure_future(answer(Dispatch([decode.socket], [prefill.socket]), request()))
        async with asyncio.timeout(60):
            while not (await tell(prefill.socket))["leases"]:
                await asyncio.sleep(0.01)
        await operate(decode.socket, Pause("abort"))
        assert await asked == ([], [], "abort")
        await asyncio.gather(*(operate(one.socket, Resume()) for one in (prefill, decode)))

    together(tiny_model, test)


def test_a_request_that_kills_every_worker_is_given_up_and_nobody_waits_beyond_his_time(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            put_frame(writer, {"begun": True})
            writer.close()

        path = decode.socket.with_name("deadly")
        async with await asyncio.start_unix_server(die, path):
            with pytest.raises(Unavailable, match="3 times: it is given up"):
                await answer(Dispatch([path], patience=60.0), request())
        nobody = Dispatch([path], ready=lambda _: False, patience=60.0)
        assert await answer(nobody, replace(request(), timeout=0.2)) == ([], [], "timeout")

    together(tiny_model, test)


def test_who_waits_for_a_worker_is_told_when_none_will_come() -> None:
    async def test() -> None:
        front = Dispatch([Path("nobody")], patience=60.0)
        asked = asyncio.ensure_future(answer(front, request()))
        await asyncio.sleep(0)
        front.close()
        with pytest.raises(Unavailable, match="The engine is shutting down"):
            await asyncio.wait_for(asked, 10)

    asyncio.run(test())

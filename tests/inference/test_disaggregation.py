"""Promises of prefill and decode in different engines: the bits of one engine, whatever dies, breaks or stalls on the
way; no block is left behind, and the other side goes on.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from liaoyuan.checkpoint import save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, EngineThread, Request, SamplingParams
from liaoyuan.inference.cache import KeyValueCache
from liaoyuan.inference.disaggregation import worker
from liaoyuan.inference.disaggregation.dispatch import Dispatch, tell
from liaoyuan.inference.disaggregation.frames import (
    LENGTHS,
    Closed,
    put_frame,
    read_frame,
    request_from_json,
    request_to_json,
)
from liaoyuan.inference.disaggregation.prefixes import Prefixes
from liaoyuan.inference.disaggregation.process import start_worker
from liaoyuan.inference.disaggregation.worker import Worker
from liaoyuan.models import Decoder

PROMPT = tuple((7 * n + n * n) % 96 for n in range(150))  # nine full blocks, and a bit
CONFIG = EngineConfig(max_sequences=8, max_batch_tokens=32, cache_tokens=1024)  # a prompt takes five steps


def request(name: str = "a", prompt: tuple[int, ...] = PROMPT, count: int = 12, seed: int | None = 5) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=count, seed=seed, top_logprobs=2))


Answer = tuple[list[int], list[float], str | None]


def alone(model: Decoder, asked: Request) -> Answer:
    done = Engine(model, CONFIG).generate([asked])[0]
    return done.tokens, done.logprobs, done.finish_reason


async def answer(front: Dispatch, asked: Request) -> Answer:
    events = [event async for event in front.stream(asked)]
    tokens = [token for event in events for token in event.tokens]
    assert len([one for event in events for one in event.top_logprobs]) == len(tokens)
    return tokens, [value for event in events for value in event.logprobs], events[-1].finish_reason


@dataclass
class Side:
    """A worker with its engine, in a thread of this process."""

    engine: Engine
    worker: Worker
    socket: Path

    async def rests(self) -> None:
        """Wait until nothing is held or computed; a hang is the failure of the test."""
        async with asyncio.timeout(20):
            while self.engine.has_work or self.worker.busy:
                await asyncio.sleep(0.001)
        self.engine.pool.check(self.engine.pool.take(0))
        assert self.engine.pool.free == self.engine.pool.size


@contextlib.asynccontextmanager
async def side(model: Decoder, folder: Path, name: str, lease: float = 10.0, **sizes: int) -> AsyncIterator[Side]:
    engine = Engine(model, CONFIG.model_copy(update=sizes))
    with EngineThread(engine) as runner:
        worker = Worker(engine, runner, lease)
        async with worker.listen(folder / name):
            yield Side(engine, worker, folder / name)


def together(model: Decoder, test: Callable[[Side, Side], Coroutine[None, None, None]], lease: float = 1e3) -> None:
    """Run a test with a prefill and a decode side, which must both be at rest, with all blocks, at its end."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            async with side(model, path, "prefill", lease) as prefill, side(model, path, "decode", lease) as decode:
                await test(prefill, decode)
                await prefill.rests()
                await decode.rests()

    asyncio.run(run())


def test_the_answer_has_the_bits_of_one_engine_and_decode_computes_no_prompt(tiny_model: Decoder) -> None:
    expected = alone(tiny_model, request())

    async def test(prefill: Side, decode: Side) -> None:
        front = Dispatch([decode.socket], [prefill.socket])
        assert await answer(front, request()) == expected
        assert decode.worker.counts["blocks_received"] == prefill.worker.counts["blocks_sent"] == 9
        assert decode.engine.statistics()["computed_tokens"] == 150 - 9 * 16 + 11
        assert await answer(front, request("again")) == expected  # nothing needs to be sent
        assert prefill.worker.counts["blocks_sent"] == 9

    together(tiny_model, test)


def test_many_at_once_get_what_one_engine_gives(tiny_model: Decoder) -> None:
    prompts = [PROMPT[start : start + 20 + 9 * start] for start in range(12)]
    asked = [request(f"r{n}", prompt, seed=n) for n, prompt in enumerate(prompts)]
    expected = [alone(tiny_model, one) for one in asked]

    async def test(prefill: Side, decode: Side) -> None:
        front = Dispatch([decode.socket], [prefill.socket])
        assert await asyncio.gather(*(answer(front, one) for one in asked)) == expected
        assert decode.worker.counts["blocks_received"] > 20

    together(tiny_model, test)


class Fault:
    """A stream between two sides that does something to the n-th frame from the prefill side."""

    def __init__(self, target: Path, kind: str, at: int) -> None:
        self.target, self.kind, self.at, self.met = target, kind, at, False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_target, to_target = await asyncio.open_unix_connection(self.target)
        back = asyncio.create_task(self._forward(reader, to_target))
        try:
            for number in range(10**9):
                lengths = await from_target.readexactly(LENGTHS.size)
                header, size = LENGTHS.unpack(lengths)
                frame = bytearray(lengths + await from_target.readexactly(header + size))
                if number == self.at:
                    self.met = True
                    if self.kind == "stalls":
                        await asyncio.Event().wait()
                    frame = self._spoil(frame, header)
                    if self.kind == "cut":
                        writer.write(frame[: len(frame) // 2])
                        return
                writer.write(frame)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            back.cancel()
            to_target.close()
            writer.close()

    def _spoil(self, frame: bytearray, header: int) -> bytearray:
        if self.kind == "flips a bit" and len(frame) > LENGTHS.size + header:
            frame[-7] ^= 16
        if self.kind == "is no frame":
            frame[LENGTHS.size] ^= 255
        if self.kind == "comes twice":
            frame = frame + frame
        return frame

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
        except OSError:  # who closes with bytes unread resets the stream
            pass
        finally:
            writer.close()


@pytest.mark.parametrize("kind", ["cut", "flips a bit", "is no frame", "comes twice", "stalls"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_prefill_side_that_fails_at_any_frame_costs_only_time(
    tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch, kind: str, at: int
) -> None:
    monkeypatch.setattr(worker, "LOT", 2)  # at least five frames with blocks
    expected = alone(tiny_model, request())

    async def test(prefill: Side, decode: Side) -> None:
        fault = Fault(prefill.socket, kind, at)
        path = prefill.socket.with_name("faulty")
        async with await asyncio.start_unix_server(fault.serve, path):
            assert await answer(Dispatch([decode.socket], [path]), request()) == expected
        assert fault.met
        assert decode.worker.counts["blocks_received"] < 9
        fresh = request("fresh", PROMPT[::-1])
        assert await answer(Dispatch([decode.socket], [prefill.socket]), fresh) == alone(tiny_model, fresh)

    together(tiny_model, test, lease=0.4 if kind == "stalls" else 1e3)


def test_no_prefill_side_at_all_costs_only_time(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        front = Dispatch([decode.socket], [prefill.socket.with_name("nobody")])
        assert await answer(front, request()) == alone(tiny_model, request())

    together(tiny_model, test)


@pytest.mark.parametrize("frames", [0, 1, 2, 5])
def test_a_decode_side_that_dies_at_any_frame_leaves_no_block_held(
    tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    monkeypatch.setattr(worker, "LOT", 2)  # at least five frames with blocks

    async def test(prefill: Side, decode: Side) -> None:
        reader, writer = await asyncio.open_unix_connection(prefill.socket)
        put_frame(writer, {"do": "prefill", "request": request_to_json(request()), "first": 0})
        for _ in range(frames):
            await read_frame(reader)
        writer.close()

    together(tiny_model, test)


def test_a_decode_side_that_falls_silent_loses_its_lease(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        reader, writer = await asyncio.open_unix_connection(prefill.socket)
        put_frame(writer, {"do": "prefill", "request": request_to_json(request()), "first": 0})
        assert await read_frame(reader) == ({"known": 0}, b"")
        await read_frame(reader)
        assert prefill.engine.pool.free < prefill.engine.pool.size
        await prefill.rests()
        assert prefill.worker.counts["leases_expired"] == 1
        with pytest.raises(Closed):
            while True:
                await read_frame(reader)
        writer.close()

    together(tiny_model, test, lease=0.3)


def test_blocks_of_other_weights_are_not_used(tiny_model: Decoder, tiny_config: object) -> None:
    from tests.conftest import randomised

    other = randomised(tiny_config, seed=9)  # type: ignore[arg-type]

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            async with side(other, path, "prefill") as prefill, side(tiny_model, path, "decode") as decode:
                front = Dispatch([decode.socket], [prefill.socket])
                assert await answer(front, request()) == alone(tiny_model, request())
                assert (prefill.worker.counts["blocks_sent"] > 0, decode.worker.counts["blocks_received"]) == (True, 0)

    asyncio.run(run())


def test_a_small_cache_takes_what_has_room(tiny_model: Decoder) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            async with side(tiny_model, path, "p", cache_tokens=192) as prefill, side(tiny_model, path, "d") as decode:
                front = Dispatch([decode.socket], [prefill.socket])
                asked = [request(f"r{n}", PROMPT[n:], seed=n) for n in range(5)]
                answers = await asyncio.gather(*(answer(front, one) for one in asked))
                assert answers == [alone(tiny_model, one) for one in asked]
                await prefill.rests()
                await decode.rests()

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_work_on_both_sides(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        stream = Dispatch([decode.socket], [prefill.socket]).stream(request(count=100))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await decode.rests()
        assert decode.engine.statistics()["generated_tokens"] < 100

    together(tiny_model, test)


def test_a_request_goes_on_at_another_decode_side_with_the_same_tokens(tiny_model: Decoder) -> None:
    """The first decode side dies after some tokens; nobody notices."""
    asked = request(count=40, seed=None)
    expected = alone(tiny_model, request(count=40, seed=0))

    async def test(prefill: Side, decode: Side) -> None:
        for at in (1, 2, 9, 40):
            fault = Fault(decode.socket, "cut", at)
            path = decode.socket.with_name(f"faulty{at}")
            async with await asyncio.start_unix_server(fault.serve, path):
                assert await answer(Dispatch([path, decode.socket], [prefill.socket]), asked) == expected
            assert fault.met

    together(tiny_model, test)


def test_when_all_decode_sides_are_gone_the_request_ends_with_a_sentence(tiny_model: Decoder) -> None:
    async def test(prefill: Side, decode: Side) -> None:
        with pytest.raises(LiaoyuanError, match="No decode worker is left"):
            await answer(Dispatch([decode.socket.with_name("nobody")]), request())
        with pytest.raises(LiaoyuanError, match="'top_p' must be"):
            await answer(Dispatch([decode.socket]), Request("a", (1,), SamplingParams(top_p=2.0)))

    together(tiny_model, test)


def test_an_engine_that_cannot_hand_over_is_refused(tiny_model: Decoder) -> None:
    class Part(KeyValueCache):
        """One process's part of a cache."""

    engine = Engine(tiny_model, CONFIG.model_copy(update={"prefix_cache": False}))
    with pytest.raises(LiaoyuanError, match="set prefix_cache to true"):
        Prefixes(engine, 1.0)
    engine = Engine(tiny_model, CONFIG)
    assert len(Prefixes(engine, 1.0).keys(request())) == 9
    engine.cache.__class__ = Part
    with pytest.raises(LiaoyuanError, match="spread over several processes"):
        Prefixes(engine, 1.0)


def test_requests_travel_whole() -> None:
    sampling = SamplingParams(logit_bias=((3, -1.5),), bad_words=((1, 2), (3,)), stop_token_ids=(5,), prompt_logprobs=2)
    asked = Request("a", (1, 2), sampling, priority=3, key="k", salt="s", timeout=2.5)
    assert request_from_json(request_to_json(asked)) == asked


def test_kill_9_of_either_process(tiny_model: Decoder, tmp_path: Path) -> None:
    """Two decode workers and a prefill worker in processes of their own; a decode worker is killed in mid-answer, then
    the prefill worker. What is left of its answer then is far more than lies on the way between processes.
    """
    longer = Decoder(replace(tiny_model.config, max_position_embeddings=1024)).eval()
    longer.load_state_dict(tiny_model.state_dict())
    save_model(longer, tmp_path / "model")

    async def run(folder: Path) -> None:
        paths = [folder / name for name in ("prefill", "decode 1", "decode 2")]
        processes = [start_worker(tmp_path / "model", path, CONFIG, lease_seconds=2.0) for path in paths]
        try:
            async with asyncio.timeout(120):
                while not all(path.exists() for path in paths):
                    await asyncio.sleep(0.05)
            front = Dispatch(paths[1:], paths[:1])
            asked = Request("a", PROMPT, SamplingParams(max_tokens=500, seed=5, top_logprobs=96))
            expected, tokens = alone(longer, asked), []
            async for event in front.stream(asked):
                tokens += event.tokens
                if len(tokens) == 10:
                    processes[1].kill()
            assert tokens == expected[0]
            assert (await tell(paths[0]))["blocks_sent"] == 18
            processes[0].kill()
            later = request("later", PROMPT[::-1])
            assert await answer(front, later) == alone(longer, later)
        finally:
            for process in processes:
                process.kill()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))

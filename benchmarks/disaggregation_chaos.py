"""Prefill and decode workers that are killed with -9 all the time: every answer must be that of one engine.

Two prefill and two decode workers in processes of their own; some requests are always open, and every now and then a
worker drawn by chance is killed, wherever it is, and started again. A request for which no decode worker was left is
asked again, and counted. At the end the workers that live must hold no block and have no open lease.

With --serve the same of `liaoyuan serve --prefill 2 --decode 2`, over HTTP, which starts its workers again by itself;
there no client asks twice.

    python benchmarks/disaggregation_chaos.py --requests 400 --pause 2
    python benchmarks/disaggregation_chaos.py --requests 400 --pause 5 --serve
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import httpx

from liaoyuan.checkpoint import save_model
from liaoyuan.data.tokenizer import train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.disaggregation.dispatch import Dispatch, tell
from liaoyuan.inference.disaggregation.process import start_worker
from liaoyuan.inference.runner import Unavailable
from liaoyuan.models import Decoder, ModelConfig, initialise

MODEL = ModelConfig("qwen3", 512, 64, 192, 3, 4, 2, 16, max_position_embeddings=1024, qk_norm=True)
CONFIG = EngineConfig(max_sequences=16, max_batch_tokens=64, cache_tokens=8192)
LEASE = 2.0  # seconds


def main() -> None:
    options = parse()
    model = initialise(Decoder(MODEL), 0).eval()
    asked = requests(options.requests)
    expected = {done.id: (done.tokens, done.logprobs) for done in Engine(model, CONFIG).generate(asked)}
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["the model needs one to be served"] * 20, 300).save(Path(folder) / "words")
        save_model(model, Path(folder) / "model", Path(folder) / "words")
        print(asyncio.run((served if options.serve else chaos)(Path(folder), asked, expected, options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--open", type=int, default=12, help="requests at once")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two deaths, on the mean")
    parser.add_argument("--serve", action="store_true", help="over HTTP")
    return parser.parse_args()


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 600 tokens, a third of which begin as others do."""
    draw = random.Random(0)
    begin = [draw.randrange(512) for _ in range(300)]
    made = []
    for n in range(count):
        fresh = [draw.randrange(512) for _ in range(draw.randrange(1, 600))]
        prompt = begin[: draw.randrange(300)] + fresh[:200] if n % 3 == 0 else fresh
        made.append(Request(n, tuple(prompt), SamplingParams(max_tokens=draw.randrange(1, 80), seed=n)))
    return made


async def chaos(folder: Path, asked: list[Request], expected: dict, options: argparse.Namespace) -> str:
    paths = [folder / name for name in ("prefill 1", "prefill 2", "decode 1", "decode 2")]
    processes = {path: start_worker(folder / "model", path, CONFIG, LEASE) for path in paths}
    counts: Counter[str] = Counter()
    while not all(path.exists() for path in paths):
        await asyncio.sleep(0.1)
    front, waiting, begin = Dispatch(paths[2:], paths[:2]), list(asked), time.perf_counter()

    async def client() -> None:
        while waiting:
            request = waiting.pop()
            counts["right" if await ask(front, request, counts) == expected[request.id] else "wrong"] += 1

    async def death() -> None:
        draw = random.Random(1)
        while True:
            await asyncio.sleep(draw.expovariate(1 / options.pause))
            path = draw.choice(paths)
            if path.exists():  # it has come up since it was killed last
                processes[path].kill()
                processes[path].wait()
                processes[path] = start_worker(folder / "model", path, CONFIG, LEASE)
                counts["kills of " + path.name.split()[0]] += 1

    killer = asyncio.create_task(death())
    try:
        await asyncio.gather(*(client() for _ in range(options.open)))
        killer.cancel()
        seconds = time.perf_counter() - begin
        states = [await rest(path) for path in paths]
    finally:
        for process in processes.values():
            process.kill()
    leaked = sum(state["blocks"] - state["free_blocks"] + state["leases"] for state in states)
    return f"{seconds:.0f} s: {dict(counts)}, held at the end: {leaked}"


async def served(folder: Path, asked: list[Request], expected: dict, options: argparse.Namespace) -> str:
    sides = ["--prefill", "2", "--decode", "2", "--port", "0", "--json", "--max-sequences", "16", "--cache-gb", "0.05"]
    command = [sys.executable, "-m", "liaoyuan", "serve", "--model", str(folder / "model"), *sides]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        url = json.loads(await asyncio.to_thread(server.stdout.readline))["url"]
        async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
            return await under_fire(client, asked, expected, options)
    finally:
        server.kill()


async def under_fire(
    client: httpx.AsyncClient, asked: list[Request], expected: dict, options: argparse.Namespace
) -> str:
    counts: Counter[str] = Counter()
    waiting, begin = list(asked), time.perf_counter()

    async def workers() -> list[dict]:
        return (await client.get("/health")).json()["workers"]

    async def ask_server() -> None:
        while waiting:
            one = waiting.pop()
            fields = {"max_tokens": one.sampling.max_tokens, "seed": one.sampling.seed, "ignore_eos": True}
            body = {"token_ids": list(one.prompt), "sampling_params": fields}
            reply = await client.post("/inference/v1/generate", json=body)
            if reply.status_code != 200:
                counts[f"refused: {reply.json()['error']['message']}"] += 1
                continue
            choice = reply.json()["choices"][0]
            right = (choice["token_ids"], choice["logprobs"]) == expected[one.id]
            counts["right" if right else "wrong"] += 1

    async def death() -> None:
        draw = random.Random(1)
        while True:
            await asyncio.sleep(draw.expovariate(1 / options.pause))
            worker = draw.choice([one for one in await workers() if one["ready"]] or [None])
            if worker is not None:
                os.kill(worker["pid"], signal.SIGKILL)
                counts["kills of " + worker["side"]] += 1

    killer = asyncio.create_task(death())
    await asyncio.gather(*(ask_server() for _ in range(options.open)))
    killer.cancel()
    seconds = time.perf_counter() - begin
    end = time.monotonic() + 120
    while not all(one["ready"] and not one["leases"] for one in await workers()) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    held = sum(one["blocks"] - one["free_blocks"] + one["leases"] for one in await workers())
    moved = (await client.get("/health")).json()["moved"]
    return f"{seconds:.0f} s: {dict(counts)}, moved: {moved}, held at the end: {held}"


async def ask(front: Dispatch, request: Request, counts: Counter[str]) -> tuple[list[int], list[float]]:
    """Ask until there is an answer."""
    while True:
        tokens, logprobs = [], []
        try:
            async for event in front.stream(request):
                tokens += event.tokens
                logprobs += event.logprobs
            return tokens, logprobs
        except Unavailable:
            counts["asked again"] += 1
            await asyncio.sleep(0.5)


async def rest(path: Path) -> dict:
    """Return a worker's state once it is up and all leases of the dead are over."""
    end = time.monotonic() + 60
    while True:
        try:
            state = await tell(path)
            if (not state["leases"] and not state["open"]) or time.monotonic() > end:
                return state
        except (OSError, LiaoyuanError):
            assert time.monotonic() < end, f"{path.name} does not come up"
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    main()

"""A server under everything at once: thousands of requests of random size while clients hang up, requests are aborted,
the engine pauses and sleeps, its weights change and adapters come and go; then every answer that was completed is asked
again, alone.

Shown at the end: what was done, what came of it, and four promises: the process is alive, no request is stuck, no block
is missing, and every completed answer has the tokens and log-probabilities of the same request alone (for an answer
whose weights changed on the way: each part of it, asked alone of the weights that made it).

    python benchmarks/engine_soak.py --requests 10000 --json engine_soak.json
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

tune_process()
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests know how an adapter's files look

import httpx  # noqa: E402
import torch  # noqa: E402
from tests.inference.adapter_files import write_adapter  # noqa: E402

from liaoyuan.checkpoint import load_model, save_model  # noqa: E402
from liaoyuan.data.tokenizer import train_tokenizer  # noqa: E402
from liaoyuan.inference import Engine, EngineConfig, Request, SamplingParams  # noqa: E402
from liaoyuan.models import Decoder, ModelConfig, initialise  # noqa: E402
from liaoyuan.serving import open_server  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog " * 40
CONTEXT = 256
ADAPTERS = ("north", "south")
TROUBLES = "adapter adapter keep keep wait abort sleep drop update update wrong forget".split()  # noqa: SIM905
CHANCES = {"hangs up": 0.12, "stream": 0.25, "deadline": 0.05}  # of a request
SIZES = EngineConfig(max_sequences=24, max_batch_tokens=192, cache_tokens=2048, speculate="ngram")


@dataclass
class Soak:
    """What happened. done: (body, reply) of the completed requests. counts: by outcome and by event."""

    done: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=48, help="that ask at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-guesses", action="store_true", help="several decode steps in a row instead")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    sizes = SIZES.model_copy(update={"speculate": ""}) if options.no_guesses else SIZES
    soak = run(options.requests, options.clients, options.seed, sizes, report=print)
    seconds = time.monotonic() - began
    for name, count in sorted(soak.counts.items()):
        print(f"{count:8d}  {name}")
    print(f"{len(soak.wrong):8d}  broken promises, after {seconds:.0f} s")
    for line in soak.wrong[:20]:
        print("  " + line)
    if options.json:
        result = {"counts": soak.counts, "wrong": soak.wrong, "seconds": seconds, "settings": vars(options)}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(soak.wrong))


def run(requests: int, clients: int, seed: int, sizes: EngineConfig, report: Any = lambda _: None) -> Soak:
    """Soak a server of its own; deterministic but for the clock."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folders = make_models(Path(folder))
        shelf = {name: Path(folder) / name for name in ADAPTERS}
        for number, place in enumerate(shelf.values()):
            write_adapter(place, folders[0], seed=number)
        with open_server(folders[0], port=0, engine=sizes, control=True, adapter_folder=Path(folder)) as server:
            soak = asyncio.run(drive(server.url, folders, requests, clients, random.Random(seed), report))
        report(f"{len(soak.done)} answers were completed; each is asked again, alone")
        compare(soak, folders, shelf)
    return soak


def make_models(folder: Path) -> list[Path]:
    """Write the same model with two sets of weights."""
    tokenizer = train_tokenizer([TEXT], 300)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig("qwen3", tokenizer.vocab_size, 32, 64, 2, 4, 2, 8, CONTEXT, qk_norm=True, dtype="bfloat16")
    for index in range(2):
        model = initialise(Decoder(config), index)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
        save_model(model, folder / str(index), folder / "tokenizer")
    return [folder / "0", folder / "1"]


async def drive(url: str, folders: list[Path], requests: int, clients: int, chance: random.Random, report: Any) -> Soak:
    """Send all requests, and trouble beside them."""
    soak, turns = Soak(), iter(range(requests))
    async with new_client(url) as client, new_client(url) as own:  # who pauses must not wait for who is paused
        over = asyncio.Event()
        trouble = asyncio.create_task(make_trouble(own, folders, soak, chance, over))
        begun = time.monotonic()

        async def worker() -> None:
            for turn in turns:
                await ask(client, body_of(chance), soak, chance)
                if turn % 1000 == 999:
                    report(f"{turn + 1} of {requests} requests, {time.monotonic() - begun:.0f} s")

        await asyncio.gather(*(worker() for _ in range(clients)))
        over.set()
        await trouble
        await check_idle(client, soak)
    return soak


def new_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=120, limits=limits)


def body_of(chance: random.Random) -> dict[str, Any]:
    """Return a random request; many begin alike, so that the prefix cache is used."""
    beginning = random.Random(chance.randrange(4))
    shared = [beginning.randrange(260) for _ in range(chance.choice([0, 0, 20, 60]))]
    own = [chance.randrange(260) for _ in range(chance.randrange(1, 60))]
    sampling = {
        "max_tokens": chance.choice([1, 2, 5, 20, 60, 100]),
        "temperature": chance.choice([0.0, 0.7, 1.0]),
        "top_p": chance.choice([1.0, 0.9]),
        "top_k": chance.choice([0, 20]),
        "seed": chance.randrange(2**31),
        "ignore_eos": chance.random() < 0.5,
    }
    body: dict[str, Any] = {"token_ids": shared + own, "sampling_params": sampling, "priority": chance.randrange(3)}
    if chance.random() < CHANCES["deadline"]:
        body["timeout"] = chance.random() * 0.05 + 1e-4
    if chance.random() < 0.1:
        body["cache_salt"] = "salt"
    if chance.random() < 0.3:
        body["model"] = chance.choice(ADAPTERS)
    return body


async def ask(client: httpx.AsyncClient, body: dict[str, Any], soak: Soak, chance: random.Random) -> None:
    """Ask once; some hang up in the middle, some read a stream."""
    path, draw = "/inference/v1/generate", chance.random()
    try:
        if draw < CHANCES["hangs up"]:
            async with (
                asyncio.timeout(chance.random() * 0.1),
                client.stream("POST", path, json=body | {"stream": True}) as reply,
            ):
                async for _ in reply.aiter_lines():
                    pass
            soak.counts["streams that were quicker than who hung up"] += 1
            return
        if draw < CHANCES["hangs up"] + CHANCES["stream"]:
            reply_json = await streamed(client, body)
        else:
            reply = await client.post(path, json=body)
            if reply.status_code == 429:
                soak.counts["refused: busy"] += 1
                return
            if "model" in body and (reply.status_code == 404 or (reply.status_code == 400 and "adapter" in reply.text)):
                soak.counts["refused: the adapter is not here now"] += 1
                return
            if reply.is_error:
                soak.wrong.append(f"{reply.status_code} to {body}: {reply.text}")
                return
            reply_json = reply.json()["choices"][0]
    except TimeoutError:
        soak.counts["clients that hung up"] += 1
        return
    except httpx.HTTPError as error:
        soak.wrong.append(f"no answer to {body}: {error!r}")
        return
    reason = reply_json["finish_reason"]
    soak.counts[f"answers that ended with '{reason}'"] += 1
    if reason in ("stop", "length"):
        soak.done.append((body, reply_json))
    elif reason not in ("timeout", "abort", "no adapter") or (reason == "timeout" and "timeout" not in body):
        soak.wrong.append(f"ended with {reason!r}: {body}")


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"token_ids": [], "logprobs": [], "versions": [], "finish_reason": None}
    async with client.stream("POST", "/inference/v1/generate", json=body | {"stream": True}) as reply:
        if reply.is_error:
            refusal = (await reply.aread()).decode()
            if "model" in body and (reply.status_code == 404 or (reply.status_code == 400 and "adapter" in refusal)):
                return whole | {"finish_reason": "no adapter"}
            raise httpx.HTTPError(f"{reply.status_code}: {refusal}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                if "adapter" in told.get("error", {}).get("message", ""):  # it went after the door had seen it
                    return whole | {"finish_reason": "no adapter"}
                choice = told["choices"][0]
                for name in ("token_ids", "logprobs", "versions"):
                    whole[name] += choice[name]
                whole["finish_reason"] = choice["finish_reason"]
    return whole


async def make_trouble(
    client: httpx.AsyncClient, folders: list[Path], soak: Soak, chance: random.Random, over: asyncio.Event
) -> None:
    """Pause, sleep, and change the weights, again and again; even versions are those of the first folder."""
    version, loaded = 0, set[str]()
    while not over.is_set():
        await asyncio.sleep(chance.random() * 0.3)
        what = chance.choice(TROUBLES)
        soak.counts[f"trouble: {what}"] += 1
        if what in ("keep", "wait", "abort"):
            await post(client, soak, "/pause", {"mode": what})
            await post(client, soak, "/resume")
        elif what == "update":
            version += 1
            await post(client, soak, "/update_weights", {"folder": str(folders[version % 2]), "version": version})
        elif what == "wrong":
            await post(client, soak, "/update_weights", {"folder": str(folders[0] / "nothing")}, expected=409)
        elif what == "forget":
            await post(client, soak, "/reset_prefix_cache")
        elif what == "adapter":
            name = chance.choice(ADAPTERS)
            verb = "unload" if name in loaded else "load"
            body = {"lora_name": name} | ({} if name in loaded else {"lora_path": name})
            loaded ^= {name}
            await post(client, soak, f"/v1/{verb}_lora_adapter", body)
        else:
            await post(client, soak, "/sleep", {"level": 1 if what == "sleep" else 2})
            await post(client, soak, "/wake_up")
            if what == "drop":
                await post(client, soak, "/update_weights", {"folder": str(folders[version % 2]), "version": version})
                await post(client, soak, "/resume")


async def post(client: httpx.AsyncClient, soak: Soak, path: str, body: Any = None, expected: int = 200) -> None:
    reply = await client.post(path, json=body)
    if reply.status_code != expected:
        soak.wrong.append(f"{path} {body}: {reply.status_code} {reply.text}")


async def check_idle(client: httpx.AsyncClient, soak: Soak) -> None:
    """Wait until nobody is left, and count the blocks; the engine itself checks each of them when it is idle."""
    health: dict[str, Any] = {}
    for _ in range(200):
        health = (await client.get("/health")).json()
        if health["open"] == health["running"] == health["waiting"] == 0:
            break
        await asyncio.sleep(0.05)
    else:
        soak.wrong.append(f"requests are stuck: {health}")
    if not health["alive"] or health["failures"]:
        soak.wrong.append(f"the engine failed: {health['error']}")
    if health["free_blocks"] != health["blocks"]:
        soak.wrong.append(f"{health['blocks'] - health['free_blocks']} blocks are missing")
    soak.counts["preemptions"] += health["preemptions"]
    soak.counts["prompt tokens found in the prefix cache"] += health["prefix_hit_tokens"]
    soak.counts["guessed tokens that were right"] += health["guessed_right"]


def compare(soak: Soak, folders: list[Path], shelf: dict[str, Path]) -> None:
    """Ask for every completed answer again, alone: the same tokens and the very bits of the log-probabilities.

    Alone is one step at a time, each called from Python.
    """
    sizes = EngineConfig(max_sequences=1, prefix_cache=False, decode_steps=1, graphs=False)
    engines = [Engine(load_model(folder), sizes) for folder in folders]
    for engine in engines:
        for name, place in shelf.items():
            engine.load_adapter(name, place)
    stops = tuple(sorted({load_model(folders[0]).config.eos_token_id or 0}))
    for body, reply in soak.done:
        tokens, start = reply["token_ids"], 0
        for end, version in spans(reply["versions"]):
            prompt = (*body["token_ids"], *tokens[:start])
            asked = {name: value for name, value in body["sampling_params"].items() if name != "ignore_eos"}
            asked["max_tokens"] = end - start
            ends = () if body["sampling_params"]["ignore_eos"] else stops
            sampling = SamplingParams(**asked, stop_token_ids=ends)
            request = Request(0, prompt, sampling, adapter=body.get("model", ""))
            alone = engines[version % 2].generate([request])[0]
            if alone.tokens != tokens[start:end] or alone.logprobs != reply["logprobs"][start:end]:
                soak.wrong.append(f"another answer alone, from token {start} on: {body}")
            start = end
        soak.counts["answers compared"] += 1
        soak.counts["answers of an adapter"] += "model" in body
        soak.counts["answers of several versions of the weights"] += len(set(reply["versions"])) > 1


def spans(versions: list[int]) -> list[tuple[int, int]]:
    """Return (end, version) of each run of one version."""
    return [
        (place + 1, version)
        for place, version in enumerate(versions)
        if place + 1 == len(versions) or versions[place + 1] != version
    ]


if __name__ == "__main__":
    main()

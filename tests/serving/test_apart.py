"""Promises of `serve --prefill N --decode M`: the whole API with the bits of one engine, whoever dies; full means 429,
a change comes to all workers or to none, and SIGTERM waits for the answers.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.cli.serve import serve as serve_command
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import EngineConfig
from liaoyuan.models import Decoder, initialise
from liaoyuan.serving import open_server
from tests.inference.adapter_files import write_adapter
from tests.serving.test_processes import children, serve, wait_until
from tests.serving.test_structured import CLOCK, FAST, PLACE, WEATHER

PATIENCE = 120.0  # seconds, on a busy machine
LONG = "What is 17 + 25? First 7 + 5 = 12, write 2 carry 1. Then 1 + 2 + 1 = 4. " * 2
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": LONG}], "seed": 5, "max_tokens": 40}
MOST_OPEN = 8  # with the options below
OPTIONS = ["--max-sequences", "4", "--max-queued", "0", "--control", "--name", "tiny"]
PASSING = {"id", "created", "created_at", "completed_at", "request_id", "item_id", "call_id"}  # differ each time
PASSING |= {"prompt_tokens_details"}  # what was in whose cache

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**CHAT, "n": 3, "logprobs": True, "top_logprobs": 2}),
    "tools": ("/v1/chat/completions", {**CHAT, **FAST, "tools": [WEATHER, CLOCK], "tool_choice": "required"}),
    "a thought with a budget, then a form": (
        "/v1/chat/completions",
        {**CHAT, "thinking_token_budget": 5, "guided_regex": "[a-f]{3,9}"},
    ),
    "a schema": ("/v1/completions", {"prompt": LONG, "seed": 1, "max_tokens": 60, "guided_json": PLACE}),
    "penalties and biases": (
        "/v1/completions",
        {
            "prompt": LONG,
            "seed": 2,
            "max_tokens": 30,
            "repetition_penalty": 1.2,
            "logit_bias": {"40": 3},
            "min_p": 0.01,
        },
    ),
    "scores": ("/v1/completions", {"prompt": LONG, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}),
    "tokens": (
        "/inference/v1/generate",
        {
            "token_ids": list(range(20, 90)),
            "sampling_params": {"max_tokens": 9, "seed": 3, "top_k": 7, "return_masks": True, "prompt_logprobs": 1},
        },
    ),
    "messages": (
        "/v1/messages",
        {"model": "tiny", "max_tokens": 20, "temperature": 0, "messages": [{"role": "user", "content": LONG}]},
    ),
    "responses": ("/v1/responses", {"input": LONG, "max_output_tokens": 20, "temperature": 0, "store": False}),
    "a stream": ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    "vectors": ("/v1/embeddings", {"input": [LONG, "17"]}),
    "a bad request": ("/v1/completions", {"prompt": LONG, "max_tokens": 10_000}),
    "a bad token": ("/inference/v1/generate", {"token_ids": [1, 99999], "stream": True}),
}


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "poet", model_folder)
    return folder


@pytest.fixture(scope="module")
def apart(model_folder: Path, adapters: Path) -> Iterator[httpx.Client]:
    """A client of one prefill and two decode workers."""
    options = ["--prefill", "1", "--decode", "2", "--lora-folder", str(adapters), *OPTIONS]
    with (
        serve(model_folder, *options) as (_, url),
        httpx.Client(base_url=url.removesuffix("/v1"), trust_env=False, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def alone(model_folder: Path, adapters: Path) -> Iterator[httpx.Client]:
    """A client of one engine."""
    sizes = EngineConfig(max_sequences=4)
    with (
        open_server(model_folder, port=0, name="tiny", engine=sizes, adapter_folder=adapters, control=True) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as client,
    ):
        yield client


def what_lasts(value: Any) -> Any:
    """Return a reply without what differs each time."""
    if isinstance(value, dict):
        return {name: what_lasts(part) for name, part in value.items() if name not in PASSING}
    return [what_lasts(part) for part in value] if isinstance(value, list) else value


def reply(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Return status and content of a reply; of a stream all its events."""
    got = client.post(path, json=body)
    if "text/event-stream" not in got.headers["content-type"]:
        return got.status_code, what_lasts(got.json())
    lines = [line.removeprefix("data: ") for line in got.text.splitlines() if line.startswith("data: {")]
    return got.status_code, joined([what_lasts(json.loads(line)) for line in lines])


def joined(events: list[dict[str, Any]]) -> Any:
    """Return the text of a stream of chat, and its last event: how they are cut is no promise."""
    deltas = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    return {name: "".join(delta.get(name) or "" for delta in deltas) for name in ("content", "reasoning")}, events[-1]


def workers(client: httpx.Client, side: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/health").json()["workers"]
    return [worker for worker in found if side in ("", worker["side"])]


def kill(client: httpx.Client, *sides: str) -> set[int]:
    """Kill all workers of these sides with -9; return which processes they were."""
    pids = {worker["pid"] for worker in workers(client) if worker["side"] in sides}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def wait_for_others(client: httpx.Client, killed: set[int]) -> None:
    """Wait until there are workers in the place of those that were killed."""

    def there() -> bool:
        return all(worker["ready"] and worker["pid"] not in killed for worker in workers(client))

    wait_until(there, PATIENCE)


@pytest.mark.parametrize("name", ASKED)
def test_every_answer_has_the_bits_of_one_engine(apart: httpx.Client, alone: httpx.Client, name: str) -> None:
    assert reply(apart, *ASKED[name]) == reply(alone, *ASKED[name])


def test_what_was_computed_for_a_request_was_in_no_cache(apart: httpx.Client) -> None:
    body = {"prompt": "Now " + LONG, "max_tokens": 2}
    usages = [apart.post("/v1/completions", json=body).json()["usage"] for _ in range(4)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] < 16 < cached[1] == cached[2] == cached[3]


def test_prompts_are_computed_by_the_prefill_side(apart: httpx.Client) -> None:
    wait_until(lambda: sum(worker["blocks_received"] for worker in workers(apart, "decode")) > 5, PATIENCE)
    assert workers(apart, "prefill")[0]["blocks_sent"] > 5
    said = apart.get("/metrics").text
    assert 'liaoyuan_worker_ready{side="prefill",worker="0"} 1.0' in said
    assert 'liaoyuan_worker_blocks_received_total{side="decode",worker="1"}' in said


def test_kill_9_of_either_side_under_load_is_noticed_by_nobody(apart: httpx.Client, alone: httpx.Client) -> None:
    def body(seed: int) -> dict[str, Any]:
        form = {"guided_regex": "[a-z ]{80,160}"} if seed % 3 == 0 else {"ignore_eos": True}
        return {"prompt": f"{seed} {LONG}"[:200], "seed": seed, "max_tokens": 100, "logprobs": 1, **form}

    expected = [reply(alone, "/v1/completions", body(seed)) for seed in range(30)]
    killed: set[int] = set()
    with ThreadPoolExecutor(MOST_OPEN) as pool:
        asked = [pool.submit(reply, apart, "/v1/completions", body(seed)) for seed in range(30)]
        for done, sides in ((3, ["decode"]), (12, ["prefill"]), (20, ["prefill", "decode"])):
            wait_until(lambda done=done: sum(one.done() for one in asked) >= done, PATIENCE)  # type: ignore[misc]
            wait_for_others(apart, killed)
            killed = kill(apart, *sides)
        got = [one.result() for one in asked]
    assert got == expected
    wait_for_others(apart, killed)
    wait_until(lambda: sum(worker["running"] + worker["leases"] for worker in workers(apart)) == 0, PATIENCE)
    assert [worker["starts"] for worker in workers(apart)] == [3, 3, 3]
    assert apart.get("/health").json()["moved"] > 0


def test_full_is_429_and_a_time_limit_holds(apart: httpx.Client) -> None:
    assert apart.post("/pause").json() == {"state": "paused", "version": 0}
    assert apart.get("/ready").status_code == 503
    late = apart.post("/inference/v1/generate", json={"token_ids": [1, 2], "timeout": 0.2}).json()
    assert late["choices"][0]["finish_reason"] == "timeout"
    with ThreadPoolExecutor(MOST_OPEN) as pool:
        body = {"prompt": LONG, "max_tokens": 5}
        asked = [pool.submit(apart.post, "/v1/completions", json=body) for _ in range(MOST_OPEN)]
        wait_until(lambda: apart.get("/load").json()["server_load"] == MOST_OPEN, PATIENCE)
        refused = apart.post("/v1/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert apart.post("/resume").json()["state"] == "ready"
        assert [one.result().status_code for one in asked] == [200] * MOST_OPEN


def test_a_client_that_leaves_ends_the_work(apart: httpx.Client) -> None:
    apart.post("/pause")
    with pytest.raises(httpx.ReadTimeout):
        apart.post("/v1/completions", json={"prompt": LONG * 2, "n": 4}, timeout=0.5)
    wait_until(lambda: apart.get("/load").json()["server_load"] == 0, PATIENCE)
    wait_until(lambda: sum(one["open"] + one["leases"] for one in workers(apart)) == 0, PATIENCE)
    apart.post("/resume")


def test_new_weights_come_to_all_or_to_none_and_to_who_is_started_later(
    apart: httpx.Client, model_folder: Path, tmp_path: Path
) -> None:
    save_model(initialise(Decoder(load_model(model_folder).config), 7), tmp_path / "new")
    before = apart.get("/weights").json()
    assert apart.post("/update_weights", json={"folder": str(tmp_path)}).status_code == 409
    assert apart.get("/weights").json() == before
    assert apart.post("/update_weights", json={"folder": str(tmp_path / "new")}).json()["version"] == 1
    after = apart.get("/weights").json()
    wait_for_others(apart, kill(apart, "decode", "prefill"))
    assert {worker["version"] for worker in workers(apart)} == {1}
    assert apart.get("/weights").json() == after != before
    assert apart.post("/update_weights", json={"folder": str(model_folder), "version": 0}).json()["version"] == 0


def test_an_adapters_prompts_are_handed_over_too(apart: httpx.Client, alone: httpx.Client) -> None:
    body = {"model": "poet", "prompt": LONG + " poet", "seed": 4, "max_tokens": 20, "logprobs": 1}
    for client in (apart, alone):
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
        assert loaded.status_code == 200, loaded.text
    assert [card["id"] for card in apart.get("/v1/models").json()["data"]] == ["tiny", "poet"]
    sent = workers(apart, "prefill")[0]["blocks_sent"]
    expected = reply(alone, "/v1/completions", body)
    assert reply(apart, "/v1/completions", body) == expected
    wait_until(lambda: workers(apart, "prefill")[0]["blocks_sent"] > sent, PATIENCE)
    killed = kill(apart, "decode")
    assert reply(apart, "/v1/completions", body) == expected
    wait_for_others(apart, killed)
    assert apart.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}).status_code == 200
    assert reply(apart, "/v1/completions", body)[0] == 404


def test_sigterm_takes_nobody_in_and_waits_for_the_answers(model_folder: Path) -> None:
    with serve(model_folder, "--prefill", "1", "--decode", "1", *OPTIONS) as (server, api):
        url, said = api.removesuffix("/v1"), []
        with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client:
            client.post("/pause")
            asked = {"prompt": LONG, "max_tokens": 9, "ignore_eos": True}
            waiting = threading.Thread(
                target=lambda: said.append(
                    httpx.post(api + "/completions", json=asked, trust_env=False, timeout=PATIENCE)
                )
            )
            waiting.start()
            wait_until(lambda: client.get("/load").json()["server_load"] == 1, PATIENCE)
            started = children(server.pid)
            assert len(started) == 2
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(url), PATIENCE)
            client.post("/resume")  # over a connection from before
            waiting.join()
        assert said[0].json()["usage"]["completion_tokens"] == 9
        assert server.wait(PATIENCE) == -signal.SIGTERM


def test_who_waits_for_an_answer_is_told_that_ctrl_c_ends_the_server(model_folder: Path) -> None:
    with (
        serve(model_folder, "--prefill", "1", "--decode", "1", *OPTIONS) as (server, api),
        httpx.Client(base_url=api.removesuffix("/v1"), trust_env=False, timeout=PATIENCE) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.post("/pause")
        waiting = pool.submit(client.post, "/v1/completions", json={"prompt": LONG, "stream": True})
        wait_until(lambda: client.get("/load").json()["server_load"] == 1, PATIENCE)
        server.send_signal(signal.SIGINT)
        told = waiting.result()
        assert (told.status_code, told.json()["error"]["code"]) == (503, "shutting_down")
        assert server.wait(PATIENCE) == 0


def refuses(url: str) -> bool:
    try:
        httpx.get(url + "/health", trust_env=False)
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prefill": 1}, "go together"),
        ({"decode": 2}, "go together"),
        ({"prefill": 1, "decode": 1, "tp": 2}, "leave out --tp"),
        ({"prefill": 1, "decode": 1, "replicas": 2}, "leave out --tp"),
    ],
)
def test_what_does_not_go_together_is_refused(model_folder: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(LiaoyuanError, match=says):
        serve_command(model_folder, port=0, **options)  # type: ignore[arg-type]


def test_a_worker_that_cannot_start_is_named(model_folder: Path, tmp_path: Path) -> None:
    from liaoyuan.serving import Sides

    with pytest.raises(LiaoyuanError, match=r"worker \d ended before it could serve"):
        open_server(model_folder, port=0, sides=Sides(1, 1, 1), adapters={"x": tmp_path / "missing"})

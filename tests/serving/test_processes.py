"""A model served by several processes: none outlives the others, and whoever waits for an answer is told."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.errors import LiaoyuanError
from tests.verbs import Verb

LONG = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 128}


@contextlib.contextmanager
def serve(model: Path, *options: str) -> Iterator[tuple[Verb, str]]:
    """Serve a model by the command line; yield the process and the address of its API."""
    with Verb("serve", "--model", model, "--port", "0", "--json", *options) as server:
        assert server.stdout
        try:
            yield server, json.loads(server.stdout.readline())["api"]
        finally:
            server.kill()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    of_threads = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for children in of_threads for child in children.read_text().split())


def wait_until(happened: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is seen to have happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        os.sched_yield()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
def test_a_killed_follower_ends_the_server_with_a_sentence(model_folder: Path) -> None:
    with serve(model_folder, "--tp", "2") as (server, api):
        (follower,) = children(server.pid)
        with httpx.stream("POST", api + "/completions", json=LONG, timeout=60, trust_env=False) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(follower, signal.SIGKILL)
            said = "".join(lines)
        assert "A process of this model failed" in said and said.endswith("data: [DONE]")
        assert server.wait(30) == LiaoyuanError.exit_code
        assert server.stderr and "Process 1 of 2 of the model was killed by SIGKILL" in server.stderr.read()


def test_a_layout_is_proven_exact_before_it_serves(model_folder: Path) -> None:
    with serve(model_folder, "--tp", "2", "--exact") as (_, api):
        health = httpx.get(api + "/health", timeout=60, trust_env=False).json()
    assert health["exact"] is True and health["layout"] == "tp 2"


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
def test_followers_end_with_their_leader_however_it_ends(model_folder: Path) -> None:
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0)):
        with serve(model_folder, "--tp", "2") as (server, api):
            (follower,) = children(server.pid)
            assert httpx.get(api + "/models", timeout=60, trust_env=False).status_code == 200
            server.send_signal(how)
            assert server.wait(30) == code
            wait_until(lambda follower=follower: is_gone(follower))
            assert server.stderr and server.stderr.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
def test_a_killed_replica_is_replaced_while_the_other_answers(model_folder: Path) -> None:
    with serve(model_folder, "--replicas", "2", "--control") as (server, api):
        client = httpx.Client(base_url=api.removesuffix("/v1"), timeout=60, trust_env=False)
        weights = {"folder": str(model_folder)}
        assert client.post("/update_weights", json=weights).json() == {"state": "ready", "version": 1}
        assert client.post("/pause", json={"mode": "later"}).status_code == 400
        with client.stream("POST", "/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            (busy,) = [state["pid"] for state in states(client) if state["open"]]
            os.kill(busy, signal.SIGKILL)
            assert client.post("/v1/completions", json={"prompt": "The", "max_tokens": 3}).status_code == 200
            said = "".join(lines)
        assert "has failed in the middle of the answer" in said and said.endswith("data: [DONE]")
        wait_until(lambda: all(state["ready"] for state in states(client)), 60)
        assert [state["version"] for state in states(client)] == [1, 1]
        replicas = children(server.pid)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert all(map(is_gone, replicas))
        assert server.stderr and server.stderr.read() == ""


def states(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/health").json()["replicas"]
    return found

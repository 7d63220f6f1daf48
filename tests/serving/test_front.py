"""Promises of several replicas behind one address: a dead one costs an answer at most, and a change comes to all."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.serving.front import Front
from liaoyuan.serving.replicas import Replicas, replica_environment
from liaoyuan.serving.server import LOOPBACK
from tests.serving.conftest import serving
from tests.serving.test_processes import wait_until

COMMAND = [sys.executable, str(Path(__file__).with_name("stand_in_replica.py"))]


@contextlib.contextmanager
def front(count: int = 2, limit: int = 2**20) -> Iterator[httpx.Client]:
    """Give a client of stand-ins behind one address."""
    environments = [replica_environment(number, 1, 1) for number in range(count)]
    with contextlib.ExitStack() as stack:
        replicas = stack.enter_context(Replicas([COMMAND] * count, environments))
        url = stack.enter_context(serving(Front(replicas, limit, LOOPBACK)))  # type: ignore[arg-type]
        yield stack.enter_context(httpx.Client(base_url=url, timeout=30, trust_env=False))


def health(client: httpx.Client) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = client.get("/health").json()["replicas"]
    return states


def all_ready(client: httpx.Client) -> bool:
    return all(state["ready"] for state in health(client))


def ask(client: httpx.Client, **body: object) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "x" * 1000, **body})


def test_requests_go_where_their_beginning_is_and_else_to_the_least_busy() -> None:
    with front(3) as client:
        assert {ask(client, prompt=f"{end} {'x' * 1000}").json()["number"] for end in range(9)} == {0}
        with client.stream("POST", "/v1/completions", json={"do": "wait", "prompt": "y" * 1000}):
            assert ask(client, prompt="z" * 1000).json()["number"] == 1
            assert ask(client, prompt="y" * 1000 + "more").json()["number"] == 0
        assert ask(client).json()["host"].startswith("127.0.0.1:")


def test_a_replica_that_dies_before_it_answers_is_replaced_and_another_one_answers() -> None:
    with front() as client:
        before = health(client)[0]["pid"]
        reply = ask(client, do="die", who=0)
        assert reply.status_code == 200 and reply.json()["number"] == 1
        wait_until(lambda: all_ready(client))
        assert health(client)[0]["pid"] != before
        assert "liaoyuan_replica_starts_total 3" in client.get("/metrics").text


def test_whoever_has_had_a_part_of_an_answer_is_told_that_it_ends() -> None:
    with front() as client:
        said = ask(client, do="die in the middle").text
        assert said.startswith("data: one\n\ndata: tw\n\n") and said.endswith("data: [DONE]\n\n")
        error = json.loads(said.split("data: ")[3])["error"]
        assert error["code"] == "replica_failed" and "in the middle of the answer" in error["message"]
        wait_until(lambda: all_ready(client))
        said = client.post("/v1/messages", json={"do": "die in the middle"}).text
        assert '\n\nevent: error\ndata: {"type": "error", "error": {"type": "api_error"' in said


def test_slots_properties_and_load_are_those_of_all_replicas() -> None:
    with front() as client:
        slots = client.get("/slots").json()
        assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
        assert [slot["is_processing"] for slot in slots] == [False, False, True, False]
        assert client.get("/props").json() == {"total_slots": 4, "is_sleeping": False, "model_alias": "tiny"}
        assert client.get("/load").json() == {"server_load": 3}


def test_nobody_is_left_to_answer() -> None:
    with front() as client:
        reply = ask(client, do="die")
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "replica_failed"
        assert reply.headers["retry-after"] == "1"
        wait_until(lambda: all_ready(client))
        assert ask(client).status_code == 200


def test_a_full_replica_is_passed_over_and_all_full_ones_say_so() -> None:
    with front() as client:
        assert ask(client, do="busy", who=0).json()["number"] == 1
        assert ask(client, do="busy").status_code == 429


def test_a_client_that_goes_frees_its_replica() -> None:
    with front(1) as client:
        with client.stream("POST", "/v1/completions", json={"do": "wait"}) as reply:
            next(reply.iter_raw())
        wait_until(lambda: "gone" in health(client)[0]["calls"])
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"do": "think"}, timeout=0.2)
        wait_until(lambda: 'liaoyuan_replica_open{replica="0"} 0' in client.get("/metrics").text)


def test_a_change_comes_to_all_and_to_those_that_start_later() -> None:
    with front() as client:
        for path in ("/pause", "/update_weights", "/resume", "/v1/load_lora_adapter", "/update_weights"):
            assert client.post(path, json={"lora_name": "a", "folder": "f"}).status_code == 200
        assert [len(state["calls"]) for state in health(client)] == [5, 5]
        ask(client, do="die", who=0)
        wait_until(lambda: all_ready(client))
        first, second = health(client)
        assert first["calls"] == ["/v1/load_lora_adapter", "/update_weights"] and len(second["calls"]) == 6


def test_what_one_replica_refuses_none_has_done() -> None:
    with front() as client:
        assert client.post("/pause").status_code == 200
        before = [state["pid"] for state in health(client)]
        reply = client.post("/update_weights", json={"do": "refuse", "who": 1, "folder": "f"})
        assert reply.status_code == 400 and reply.json() == {"number": 1}
        wait_until(lambda: all_ready(client))
        states = health(client)
        assert [state["calls"] for state in states] == [["/pause"], ["/pause"]]
        assert states[0]["pid"] != before[0] and states[1]["pid"] == before[1]


def test_health_and_metrics_are_sums() -> None:
    with front() as client:
        state = client.get("/health").json()
        assert state["status"] == "ok" and state["running"] == 2 and len(state["replicas"]) == 2
        text = client.get("/metrics").text
        assert 'asked{path="/"} 3' in text and "liaoyuan_replicas_ready 2" in text


def test_the_door_is_guarded() -> None:
    with front(1, limit=1000) as client:
        assert ask(client, prompt="x" * 2000).status_code == 413
        refused = client.get("/health", headers={"host": "elsewhere.example"})
        assert refused.status_code == 403 and "is not this machine" in refused.json()["error"]["message"]


def test_replicas_that_cannot_start_are_a_sentence_and_leave_nothing() -> None:
    environments = [replica_environment(number, 1, 1) for number in range(2)]
    with (
        pytest.raises(LiaoyuanError, match="ended before it could serve"),
        Replicas([COMMAND, [*COMMAND, "broken"]], environments) as replicas,
    ):
        pytest.fail(f"{replicas} has started")


def test_replicas_end_with_their_front() -> None:
    with front() as client:
        pids = [state["pid"] for state in health(client)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

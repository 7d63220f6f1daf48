"""Oracle: Prometheus' own parser reads what `/metrics` says, and the numbers are those of what was asked."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.serving import open_server
from tests.serving.conftest import scripted
from tests.serving.test_http import ENDLESS, MESSAGES, PATIENCE, lost_client, wait_until


def samples(client: httpx.Client, **headers: str) -> dict[tuple, float]:
    """Return the value of each sample by its name and labels (but "le" of the last bucket alone)."""
    reply = client.get("/metrics", headers=headers)
    parse = open_metrics if "openmetrics" in reply.headers["content-type"] else plain_text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(reply.text)
        for sample in family.samples
    }


@pytest.fixture
def client(model_folder: Path) -> Iterator[httpx.Client]:
    with (
        open_server(model_folder, port=0) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as made,
    ):
        yield made


def test_tokens_and_times_are_counted_by_endpoint(client: httpx.Client) -> None:
    asked = {"prompt": [265, 270, 271], "max_tokens": 5, "ignore_eos": True}
    for _ in range(3):
        client.post("/v1/completions", json=asked)
    client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 7, "ignore_eos": True, "n": 2})
    found = samples(client)
    plain, chat = ("endpoint", "/v1/completions"), ("endpoint", "/v1/chat/completions")
    assert found["liaoyuan_generated_tokens_total",] == 3 * 5 + 2 * 7
    assert found["liaoyuan_prompt_tokens_total",] > 3 * 3
    for endpoint, answers, tokens in ((plain, 3, 5), (chat, 2, 7)):
        assert found["liaoyuan_answers_total", endpoint, ("reason", "length")] == answers
        assert found["liaoyuan_time_to_first_token_seconds_count", endpoint] == answers
        assert found["liaoyuan_request_latency_seconds_count", endpoint] == answers
        assert found["liaoyuan_inter_token_latency_seconds_count", endpoint] == answers * (tokens - 1)
        whole = found["liaoyuan_request_latency_seconds_sum", endpoint]
        first = found["liaoyuan_time_to_first_token_seconds_sum", endpoint]
        between = found["liaoyuan_inter_token_latency_seconds_sum", endpoint]
        assert first + between == pytest.approx(whole, rel=0.2)
        assert ("liaoyuan_aborts_total", endpoint) not in found
    assert found["liaoyuan_http_replies_total", plain, ("status", "200")] == 3


def test_queue_batch_and_cache_are_the_engines_own(client: httpx.Client) -> None:
    prompt = list(range(20, 84))
    for _ in range(2):
        client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, "ignore_eos": True})
    found, health = samples(client), client.get("/health").json()
    for ours, theirs in (("requests_running", "running"), ("requests_waiting", "waiting"), ("steps_total", "steps")):
        assert found[f"liaoyuan_{ours}",] == health[theirs]
    assert found["liaoyuan_alive",] == 1 and found["liaoyuan_cache_use_ratio",] == 0
    assert found["liaoyuan_prefix_cache_hit_tokens_total",] == health["prefix_hit_tokens"] > 0
    assert 0 < found["liaoyuan_prefix_cache_hit_ratio",] < 1
    assert found["liaoyuan_preemptions_total",] == 0


def test_both_formats_of_prometheus_are_spoken(client: httpx.Client) -> None:
    client.get("/ping")
    plain = samples(client)
    newer = samples(client, Accept="application/openmetrics-text; version=1.0.0")
    assert plain and plain.keys() <= {*newer, *plain} and ("liaoyuan_alive",) in newer


def test_refusals_and_strange_paths_cannot_fill_the_memory(client: httpx.Client) -> None:
    for number in range(30):
        client.get(f"/never/{number}")
    client.post("/v1/completions", json={"prompt": ""})
    found = samples(client)
    assert found["liaoyuan_refusals_total", ("endpoint", "other")] == 30
    assert found["liaoyuan_refusals_total", ("endpoint", "/v1/completions")] == 1
    assert len({name for name in found if name[0] == "liaoyuan_refusals_total"}) == 2


def test_lost_clients_and_stop_strings_are_told_apart(tokenizer: Tokenizer) -> None:
    endpoint = ("endpoint", "/v1/chat/completions")
    with (
        scripted(tokenizer, "</think>" + ENDLESS, pace=0.002) as (url, runner),
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client,
    ):
        with lost_client(url, {"messages": MESSAGES}):
            wait_until(lambda: runner.open == 1)
        wait_until(lambda: runner.open == 0)
        client.post("/v1/chat/completions", json={"messages": MESSAGES, "stop": "= 4"})
        wait_until(lambda: samples(client).get(("liaoyuan_aborts_total", endpoint)) == 1)
        assert samples(client)["liaoyuan_answers_total", endpoint, ("reason", "stop")] == 1


def test_each_path_of_the_schema_has_a_series_of_its_own(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, "42") as (url, _), httpx.Client(base_url=url, trust_env=False) as client:
        paths = [path for path in client.get("/openapi.json").json()["paths"] if "{" not in path]
        for path in paths:
            client.delete(path)
        counted = client.get("/metrics").text
    assert len(paths) > 20 and not [path for path in paths if f'endpoint="{path}"' not in counted]


def test_many_at_once_are_all_counted(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, "</think>The answer is 42.") as (url, _):

        def asked(number: int) -> int:  # each on a connection and an event loop of its own
            return httpx.post(
                f"{url}/v1/chat/completions", json={"messages": MESSAGES}, trust_env=False, timeout=PATIENCE
            ).status_code

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert set(pool.map(asked, range(40))) == {200}
        with httpx.Client(base_url=url, trust_env=False) as client:
            found = samples(client)
        assert found["liaoyuan_answers_total", ("endpoint", "/v1/chat/completions"), ("reason", "stop")] == 40


def test_llama_cpps_names_say_what_its_clients_count(client: httpx.Client) -> None:
    read = cached = written = 0
    for count in (1, 4, 16):
        asked = {"prompt": "The answer is 42. " * 5, "n_predict": count, "ignore_eos": True}
        times = client.post("/completion", json=asked).json()["timings"]
        read, cached, written = read + times["prompt_n"], cached + times["cache_n"], written + times["predicted_n"]
    client.post("/v1/embeddings", json={"input": [[5, 6, 7], [8]]})
    found = samples(client)
    assert cached > 0 and found["llamacpp:prompt_tokens_cached_total",] == cached
    assert found["llamacpp:prompt_tokens_total",] == read + 4
    assert found["llamacpp:tokens_predicted_total",] == written == 21
    assert found["llamacpp:n_decode_total",] == found["liaoyuan_steps_total",] + 1
    longest = found.get(("llamacpp:n_tokens_max",)) or found["llamacpp:n_tokens_max_total",]
    assert longest == (read + cached) // 3 + 16
    spent = found["llamacpp:tokens_predicted_seconds_total",]
    assert found["llamacpp:predicted_tokens_seconds",] == pytest.approx((written - 3) / spent)
    assert samples(client)["llamacpp:predicted_tokens_seconds",] == 0.0  # none since the last look
    assert not any("llamacpp" in name[0] for name in samples(client, accept="application/openmetrics-text"))
    kinds = [line.split()[2:] for line in client.get("/metrics").text.splitlines() if line.startswith("# TYPE llama")]
    assert ["llamacpp:n_tokens_max", "counter"] in kinds and ["llamacpp:requests_processing", "gauge"] in kinds
    assert int(client.get("/metrics").headers["process-start-time-unix"]) > 1_700_000_000

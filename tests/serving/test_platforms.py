"""Promises of the paths under which clouds call a container: the very replies of the paths that they stand for."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server

HI = [{"role": "user", "content": "Hi"}]
FIXED = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[httpx.Client]:
    serving = open_server(model_folder, port=0, name="tiny", engine=EngineConfig(max_sequences=8))
    with serving as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v1/chat/completions", {"messages": HI, **FIXED}, "choices"),
        ("/v1/completions", {"prompt": "The answer", **FIXED}, "choices"),
        ("/v1/embeddings", {"input": "The answer"}, "data"),
        ("/v1/embeddings", {"messages": HI, "encoding_format": "float"}, "data"),
        ("/rerank", {"query": "answer", "documents": ["a", "b"]}, "results"),
        ("/score", {"text_1": "answer", "text_2": ["a", "b"]}, "data"),
    ],
)
def test_an_invocation_is_answered_as_the_path_that_it_means(
    client: httpx.Client, path: str, body: dict, told: str
) -> None:
    own, invoked = (client.post(at, json=body) for at in (path, "/invocations"))
    assert own.status_code == invoked.status_code == 200
    assert own.json().keys() == invoked.json().keys()
    assert own.json()[told] == invoked.json()[told]


def test_an_invocation_may_be_streamed(client: httpx.Client) -> None:
    body = {"messages": HI, **FIXED, "stream": True}
    lines = client.post("/invocations", json=body).text.split("\n\n")
    assert lines[0].startswith("data: {") and lines[-2] == "data: [DONE]"


def test_instances_are_answered_together(client: httpx.Client) -> None:
    chat = {"@requestFormat": "chatCompletions", "messages": HI, **FIXED}
    plain = {"prompt": "The answer", **FIXED}
    parameters = {"temperature": 0, "max_tokens": 2}
    reply = client.post("/predict", json={"instances": [chat, plain, {"prompt": "A"}], "parameters": parameters}).json()
    kinds = [each["object"] for each in reply["predictions"]]
    assert kinds == ["chat.completion", "text_completion", "text_completion"]
    assert [each["usage"]["completion_tokens"] for each in reply["predictions"]] == [4, 4, 2]


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/invocations", {"text": "Hi"}, "messages, prompt, input"),
        ("/invocations", {"messages": HI, "temprature": 1}, "did you mean 'temperature'"),
        ("/predict", {"instances": [{"messages": HI, "temprature": 1}]}, "did you mean 'temperature'"),
        ("/predict", {"instances": [{"@requestFormat": "chat", "messages": HI}]}, "chatCompletions"),
        ("/predict", {"instances": [{"messages": HI, "stream": True}]}, "cannot be streamed"),
        ("/predict", {"instances": []}, "instances"),
    ],
)
def test_what_means_nothing_is_refused(client: httpx.Client, path: str, body: dict, why: str) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and why in reply.json()["error"]["message"]

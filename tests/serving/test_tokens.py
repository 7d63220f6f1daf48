"""Oracles: the `tokenizers` library itself, and lm-eval's own client of a remote tokenizer."""

from collections.abc import Iterator

import httpx
import pytest

from liaoyuan.data.tokenizer import Tokenizer
from tests.serving.conftest import scripted

TEXTS = ["What is 17 + 25?", "十七加二十五", "a <|end|> b", "\x00\n\t 🤗", ""]


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    with scripted(tokenizer, "x") as (url, _), httpx.Client(base_url=url, trust_env=False) as made:
        yield made


def post(client: httpx.Client, path: str, **fields: object) -> dict:
    reply = client.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_there_and_back(client: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    vllm = post(client, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)
    assert vllm["count"] == len(vllm["tokens"]) and vllm["max_model_len"] == 4096
    assert [tokenizer.token_id(word) for word in vllm["token_strs"]] == vllm["tokens"]
    llama = post(client, "/tokenize", content=text)
    assert llama["tokens"] == vllm["tokens"]
    back = post(client, "/detokenize", tokens=vllm["tokens"])
    assert back == {"prompt": text, "content": text}


def test_special_tokens_in_a_text_are_read_as_asked(client: httpx.Client, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|end|>")
    assert end in post(client, "/tokenize", content="a <|end|>")["tokens"]
    plain = post(client, "/tokenize", content="a <|end|>", parse_special=False)["tokens"]
    assert plain == tokenizer.encode("a <|end|>") and end not in plain


def test_pieces_that_are_no_text_are_bytes(client: httpx.Client) -> None:
    pieces = post(client, "/tokenize", content="a 🤗", with_pieces=True)["tokens"]
    raw = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert raw.decode() == "a 🤗" and any(isinstance(p["piece"], list) for p in pieces)


def test_messages_are_counted_as_a_chat_counts_them(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    counted = post(client, "/tokenize", messages=messages)["count"]
    assert counted == post(client, "/v1/chat/completions", messages=messages)["usage"]["prompt_tokens"]
    assert post(client, "/tokenize", messages=messages, add_generation_prompt=False)["count"] < counted


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/tokenize", {}, "one of 'prompt', 'messages' and 'content'"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "one of"),
        ("/tokenize", {"promt": "a"}, "did you mean 'prompt'"),
        ("/tokenize", {"prompt": ["a"]}, "a text"),
        ("/detokenize", {"tokens": [10**9]}, "vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
        ("/detokenize", {"tokens": "a"}, "list"),
    ],
)
def test_what_makes_no_sense_is_refused(client: httpx.Client, path: str, body: dict, why: str) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and why in reply.json()["error"]["message"]


def test_lm_eval_reads_the_tokenizer_from_afar(client: httpx.Client, tokenizer: Tokenizer) -> None:
    from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

    url = str(client.base_url) + "/v1/completions"
    assert check_remote_tokenizer_support(url)
    remote = RemoteTokenizer(url)
    assert (remote.eos_token, remote.bos_token) == ("<|end|>", "<|end_of_text|>")
    assert remote.eos_token_id == tokenizer.token_id("<|end|>")
    assert remote.encode("The answer") == tokenizer.encode("The answer")
    assert remote.decode(tokenizer.encode("The answer")) == "The answer"
    messages = [{"role": "user", "content": "hi"}]
    filled = remote.apply_chat_template(messages, enable_thinking=True)
    assert filled.rstrip("\n") == tokenizer.render_text(messages)  # lm-eval leaves line ends as they are written

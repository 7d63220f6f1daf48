"""Promises of `/v1/completions` beside the plain answer: ids in and out, scores of prompts, the best of several."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.evaluation import score
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import open_server
from tests.serving.conftest import CONTEXT

ENGINE = EngineConfig(max_sequences=16, max_batch_tokens=64)


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[openai.OpenAI]:
    with (
        open_server(model_folder, port=0, name="tiny", engine=ENGINE) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def complete(client: openai.OpenAI, extra: dict | None = None, **fields: object):
    return client.completions.create(**{"model": "tiny", "prompt": "The answer", **fields}, extra_body=extra)


def test_the_best_of_several_is_the_most_probable_on_average(client: openai.OpenAI) -> None:
    asked = {"max_tokens": 12, "seed": 5, "temperature": 1.5, "logprobs": 0}
    every = complete(client, n=6, **asked)
    means = [statistics.mean(choice.logprobs.token_logprobs) for choice in every.choices]
    best = complete(client, best_of=6, n=2, **asked)
    order = sorted(range(6), key=lambda index: -means[index])
    assert [choice.text for choice in best.choices] == [every.choices[index].text for index in order[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == every.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="at least 'n'"):
        complete(client, best_of=1, n=2)
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        complete(client, best_of=2, stream=True)


def test_tokens_come_back_as_ids(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = {"max_tokens": 200, "seed": 3, "temperature": 2.0, "logprobs": 1}
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = complete(client, extra, **asked).choices[0]
    assert choice.prompt_token_ids == tokenizer.encode("The answer", add_special_tokens=True)
    ids = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    assert ids == choice.token_ids
    if choice.finish_reason == "stop":
        assert ids[-1] in tokenizer.eos_ids
    chunks = [chunk.choices[0] for chunk in complete(client, extra, **asked, stream=True)]
    assert chunks[0].prompt_token_ids == choice.prompt_token_ids
    assert [index for chunk in chunks for index in chunk.token_ids] == choice.token_ids
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in chunks[1:])


def test_what_was_said_can_be_given_back_as_ids(client: openai.OpenAI) -> None:
    """Tokens in, tokens out: a second turn that goes on from the ids of the first is the first, longer."""
    asked = {"temperature": 0, "extra": {"return_token_ids": True, "ignore_eos": True}}
    whole = complete(client, **asked, max_tokens=20).choices[0]
    first = complete(client, **asked, max_tokens=9).choices[0]
    second = complete(client, **asked, prompt=first.prompt_token_ids + first.token_ids, max_tokens=11).choices[0]
    assert first.token_ids + second.token_ids == whole.token_ids


def test_the_token_that_ends_an_answer_is_scored_too(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """lm-eval takes the last entry for the generated token: it must be there even if it has no text."""
    any_token = list(range(tokenizer.vocab_size))
    extra = {"stop_token_ids": any_token}
    choice = complete(client, extra, max_tokens=5, echo=True, logprobs=1, temperature=0).choices[0]
    assert choice.finish_reason == "stop" and choice.text == "The answer"
    assert len(choice.logprobs.token_logprobs) == len(tokenizer.encode("The answer", add_special_tokens=True)) + 1
    assert choice.logprobs.text_offset[-1] == len("The answer")


@pytest.mark.parametrize("length", [1, 2, 30, 64, 65, 200])
def test_a_prompt_is_scored_as_evaluation_scores_it(client: openai.OpenAI, model_folder: Path, length: int) -> None:
    """To the last bit if it fits into one step of the engine, else as nearly as chunks allow."""
    ids = [20 + place * 7 % 200 for place in range(length)]
    expected = score(load_model(model_folder), [ids])[0]
    extra = {"prompt_logprobs": 2}
    choice = complete(client, extra, prompt=ids, max_tokens=1, echo=True, logprobs=1).choices[0]
    echoed, listed = choice.logprobs.token_logprobs, choice.prompt_logprobs
    assert echoed[0] is None and listed[0] is None and len(listed) == length
    scored = [row[str(token)]["logprob"] for row, token in zip(listed[1:], ids[1:], strict=True)]
    if length <= 64:
        assert echoed[1:length] == scored == expected
    assert echoed[1:length] == scored == pytest.approx(expected, abs=1e-5)
    for row, token in zip(listed[1:], ids[1:], strict=True):
        ranks = sorted(entry["rank"] for entry in row.values() if entry["rank"])
        assert ranks == [1, 2] and len(row) in (2, 3)
        assert all(entry["logprob"] >= row[str(token)]["logprob"] for entry in row.values() if entry["rank"] == 1)


def test_prompts_alone_are_scored_without_an_answer(client: openai.OpenAI) -> None:
    reply = complete(client, {"prompt_logprobs": 0}, prompt=["The answer", "What"], max_tokens=0)
    assert [choice.text for choice in reply.choices] == ["", ""] and reply.usage.completion_tokens == 0
    assert all(len(row) == 1 for choice in reply.choices for row in choice.prompt_logprobs[1:])
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        complete(client, {"prompt_logprobs": 0}, stream=True)
    with pytest.raises(openai.BadRequestError, match="only with 'echo'"):
        complete(client, max_tokens=0)


def test_a_long_prompt_is_cut_at_its_beginning_if_asked(client: openai.OpenAI) -> None:
    ids = [20 + place % 200 for place in range(2 * CONTEXT)]
    extra = {"return_token_ids": True}
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, extra, prompt=ids, max_tokens=4)
    assert refused.value.code == "context_length_exceeded"
    for keep, kept in ((10, 10), (-1, CONTEXT - 4)):
        reply = complete(client, {**extra, "truncate_prompt_tokens": keep}, prompt=ids, max_tokens=4, echo=True)
        assert reply.choices[0].prompt_token_ids == ids[-kept:]
        assert reply.usage.prompt_tokens == kept


def test_cached_tokens_are_reported_and_salts_keep_them_apart(client: openai.OpenAI) -> None:
    prompt = [30 + place % 150 for place in range(100)]

    def cached(**extra: object) -> int:
        reply = complete(client, extra, prompt=prompt, max_tokens=1)
        return reply.usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") >= 64
    assert cached(cache_salt="two") == 0
    with pytest.raises(openai.BadRequestError):
        cached(cache_salt="")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("suffix", " end", "only continues text"),
        ("best_of", 1000, "less than or equal to 128"),
        ("priority", 2**40, "less than"),
        ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
        ("truncate_prompt_tokens", 0, "at least one token"),
        ("prompt_logprobs", -1, "must be from 0 to 20 here"),
        ("return_token_ids", 1, "boolean"),
        ("cache_slat", "x", "did you mean 'cache_salt'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: openai.OpenAI, field: str, value: object, why: str) -> None:
    with pytest.raises(openai.BadRequestError, match=why):
        complete(client, {field: value}, max_tokens=2)

"""Oracle: the official `openai` client against a real server with a tiny random model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from liaoyuan.checkpoint import load_model
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.models import packed_context
from liaoyuan.serving import open_server
from tests.serving.conftest import CONTEXT

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
FAST = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with open_server(model_folder, port=0, name="tiny", engine=EngineConfig(max_sequences=8)) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


def test_a_chat_says_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "seed": 7, "extra_body": FAST}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert message.content == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_thoughts_come_under_both_names(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, seed=1)
    message = reply.choices[0].message
    assert message.reasoning and message.reasoning == message.reasoning_content
    details = reply.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens <= reply.usage.completion_tokens
    chunks = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, seed=1, stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == message.reasoning


@pytest.mark.parametrize("switch", [{"extra_body": FAST}, {"reasoning_effort": "none"}])
def test_thinking_can_be_switched_off(client: openai.OpenAI, switch: dict) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, seed=1, **switch)
    assert reply.choices[0].message.reasoning is None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "The answer", "max_tokens": 20, "n": 3, "seed": -5}
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "The", "max_tokens": 60, "seed": 3, "temperature": 1.5}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:24]
    expected = text[: text.index(stop)]
    reply = client.completions.create(**asked, stop=[stop, "never said"])
    assert reply.choices[0].text == expected and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 60
    chunks = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_logprobs_are_the_models_own(client: openai.OpenAI, model_folder: Path, tokenizer: Tokenizer) -> None:
    asked = {"messages": QUESTION, "max_tokens": 12, "seed": 2, "logprobs": True, "top_logprobs": 3}
    reply = client.chat.completions.create(model="tiny", extra_body=FAST, **asked)
    scored = reply.choices[0].logprobs.content
    chunks = list(client.chat.completions.create(model="tiny", extra_body=FAST, stream=True, **asked))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == scored
    prompt = tokenizer.render(QUESTION, thinking=False)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    answer = [by_bytes[bytes(token.bytes)] for token in scored]
    assert tokenizer.decode(answer).lstrip("\n") == reply.choices[0].message.content
    logprobs = _logprobs(model_folder, [*prompt, *answer])[len(prompt) - 1 :]
    for row, token, index in zip(logprobs, scored, answer, strict=False):
        assert token.logprob == pytest.approx(row[index].item(), abs=1e-4)
        assert [rival.logprob for rival in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_echo_scores_the_prompt(client: openai.OpenAI, model_folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The answer is 42.")
    for most in (0, 2):
        reply = client.completions.create(model="tiny", prompt=ids, max_tokens=most, echo=True, logprobs=1)
        scores = reply.choices[0].logprobs
        assert reply.choices[0].text.startswith("The answer is 42.")
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        expected = _logprobs(model_folder, ids)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert scores.token_logprobs[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(scores.tokens) == len(scores.text_offset) == len(scores.top_logprobs) == len(ids) + most
        assert reply.usage.completion_tokens == most
        assert [reply.choices[0].text[at:][:1] for at in scores.text_offset[: len(ids)]] == [
            tokenizer.decode([index])[:1] for index in ids
        ]


def _logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(folder)
    positions, context = packed_context([len(ids)])
    with torch.no_grad():
        return model(torch.tensor(ids), positions, context).float().log_softmax(-1)


@pytest.mark.parametrize("prompt", ["The answer", ["The answer", "What is"], [265, 270], [[265], [270, 271]]])
def test_a_prompt_may_be_text_or_ids_alone_or_listed(client: openai.OpenAI, prompt: object) -> None:
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, temperature=0, n=2)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert len(reply.choices) == (4 if several else 2)


def test_what_is_refused_and_how(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as refused:
        chat(model="gpt-5", messages=QUESTION)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    for asked in ({"max_tokens": CONTEXT}, {"messages": [{"role": "user", "content": "12 " * 500}]}):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(**{"model": "tiny", "messages": QUESTION, **asked})
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="did you mean 'max_tokens'"):
        chat(model="tiny", messages=QUESTION, extra_body={"max_token": 5})
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[tokenizer.vocab_size])


def test_the_chosen_token_is_always_among_the_top_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "The answer", "max_tokens": 12, "seed": 4, "temperature": 1.5, "echo": True}
    for count in (0, 2):
        scores = client.completions.create(**asked, logprobs=count).choices[0].logprobs
        rows = list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[1:]
        for token, logprob, top in rows:
            assert top[token] == logprob and max(count, 1) <= len(top) <= count + 1


def test_stream_options_need_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="only allowed with 'stream'"):
        client.completions.create(model="tiny", prompt="x", stream_options={"include_usage": True})


def test_running_usage_counts_up(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "tiny", "prompt": "The", "max_tokens": 9, "stream": True, "extra_body": {"ignore_eos": True}}
    chunks = list(client.completions.create(**asked, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [*range(1, 10), 9]


def test_fields_that_change_nothing_are_accepted(client: openai.OpenAI) -> None:
    neutral = {"tools": [], "frequency_penalty": 0, "response_format": {"type": "text"}, "logit_bias": {}}
    client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=1, user="me", metadata={"a": "b"}, tool_choice="none", **neutral
    )


def test_many_asynchronous_clients_get_what_they_would_alone(url: str, client: openai.OpenAI) -> None:
    def asked(number: int) -> dict:
        return {"model": "tiny", "prompt": f"What is {number}?", "max_tokens": 24, "temperature": 0}

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as many:
            whole = [many.completions.create(**asked(n)) for n in range(10)]
            streams = [_text(await many.completions.create(**asked(n), stream=True)) for n in range(10, 20)]
            replies = await asyncio.gather(*whole, *streams)
            return [reply if isinstance(reply, str) else reply.choices[0].text for reply in replies]

    together = asyncio.run(everyone())
    assert together == [client.completions.create(**asked(n)).choices[0].text for n in range(20)]


async def _text(stream: openai.AsyncStream) -> str:
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_an_answer_goes_on_from_the_beginning_it_is_given(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The answer"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    chat = client.chat.completions.create(messages=begun, **asked, extra_body=more)
    prompt = [*tokenizer.render(QUESTION, thinking=False), *tokenizer.encode("The answer")]
    assert chat.choices[0].message.content == client.completions.create(prompt=prompt, **asked).choices[0].text
    for wrong in ({"continue_final_message": True, "add_generation_prompt": True}, {"messages": QUESTION, **more}):
        with pytest.raises(openai.BadRequestError, match="continue_final_message"):
            client.chat.completions.create(**{"messages": begun, **asked}, extra_body=wrong)


def test_a_chat_tells_its_tokens_and_keeps_its_thoughts_back(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 1}
    extra = {"return_token_ids": True, "include_reasoning": False}
    whole = client.chat.completions.create(**asked, extra_body=extra)
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=extra))
    assert whole.prompt_token_ids == chunks[0].prompt_token_ids == tokenizer.render(QUESTION, thinking=True)
    assert len(whole.choices[0].token_ids) == whole.usage.completion_tokens
    streamed = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", [])]
    assert streamed == whole.choices[0].token_ids
    assert whole.choices[0].message.reasoning is None
    assert not any(getattr(chunk.choices[0].delta, "reasoning", None) for chunk in chunks)


def test_a_chat_scores_its_prompt_as_a_completion_does(client: openai.OpenAI) -> None:
    more = {**FAST, "prompt_logprobs": 2, "return_token_ids": True}
    chat = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1, extra_body=more)
    asked = {"model": "tiny", "prompt": chat.prompt_token_ids, "max_tokens": 1}
    plain = client.completions.create(**asked, extra_body={"prompt_logprobs": 2})
    assert chat.prompt_logprobs == plain.choices[0].prompt_logprobs and chat.prompt_logprobs[0] is None
    with pytest.raises(openai.BadRequestError, match="streamed"):
        client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, extra_body={"prompt_logprobs": 1})
    unasked = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert unasked.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_beginning_that_an_answer_goes_on_from_is_given_back_if_it_is_wanted(
    client: openai.OpenAI, stream: bool
) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "The answer"}]
    said = []
    for echo in (True, False):
        more = {**FAST, "continue_final_message": True, "echo": echo}
        asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": 3, "extra_body": more}
        reply = client.chat.completions.create(**asked, stream=stream)
        said += ["".join(c.choices[0].delta.content or "" for c in reply)] if stream else [reply.choices[0].message]
    echoed, plain = said if stream else [message.content for message in said]
    assert echoed == "The answer" + plain


def test_there_is_nothing_to_echo_in_an_answer_that_goes_on_from_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"echo": True})


def test_a_prompt_is_counted_before_it_is_sent(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    body = {"model": "tiny", "messages": QUESTION}
    counted = client.post("/chat/completions/input_tokens", body=body, cast_to=object)
    assert counted == {"input_tokens": reply.usage.prompt_tokens}
    items = client.responses.input_tokens.count(model="tiny", input=QUESTION[0]["content"])
    assert items.input_tokens == client.responses.create(model="tiny", input="What is 17 + 25?").usage.input_tokens


def test_all_wrong_keys_of_a_bias_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'one', 'two'"):
        client.completions.create(model="tiny", prompt="x", logit_bias={"one": 1, "1": 1, "two": 1})


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_seed_is_a_whole_number_of_64_bits(client: openai.OpenAI, seed: int) -> None:
    with pytest.raises(openai.BadRequestError, match="seed"):
        client.completions.create(model="tiny", prompt="x", seed=seed)


def test_which_end_of_a_long_prompt_goes(client: openai.OpenAI) -> None:
    for side, kept in (("right", [1, 2, 3]), ("left", [4, 5, 6])):
        more = {"return_token_ids": True, "truncate_prompt_tokens": 3, "truncation_side": side}
        reply = client.completions.create(model="tiny", prompt=[1, 2, 3, 4, 5, 6], max_tokens=1, extra_body=more)
        assert reply.choices[0].prompt_token_ids == kept


def test_special_tokens_of_a_prompt_of_tokens_are_echoed(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eos_ids[0], *tokenizer.encode("Hi"), tokenizer.eos_ids[0]]
    reply = client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=0)
    end = tokenizer.spelling(tokenizer.eos_ids[0])
    assert reply.choices[0].text.startswith(f"{end}Hi{end}")
    assert reply.choices[0].logprobs.text_offset[:2] == [0, len(end)]


def test_a_chat_may_be_given_the_very_tokens_of_its_prompt(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(**asked, messages=QUESTION, extra_body={"return_token_ids": True})
    more = {"kv_transfer_params": {"prompt_token_ids": first.prompt_token_ids}, "return_token_ids": True}
    other = [{"role": "user", "content": "Something else"}]
    again = client.chat.completions.create(**asked, messages=other, extra_body=more)
    assert again.prompt_token_ids == first.prompt_token_ids
    assert again.choices[0].token_ids == first.choices[0].token_ids

"""Oracle: the official `openai` client; embeddings, rankings and scores agree with each other."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.inference import EngineConfig
from liaoyuan.serving import Settings, open_server
from tests.serving.conftest import CONTEXT

TEXTS = ["The answer is 42.", "What is 17 + 25?", "十七加二十五", "Then 1 + 2"]
SMALL = EngineConfig(max_sequences=4, max_batch_tokens=16)  # so that a text takes several steps


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with open_server(model_folder, port=0, name="tiny", engine=SMALL) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def post(url: str, path: str, **fields: object) -> dict:
    reply = httpx.post(url + path, json=fields, trust_env=False, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def cosine(one: list[float], other: list[float]) -> float:
    return float(np.dot(one, other))


def test_a_text_is_a_vector_of_length_one(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    reply = client.embeddings.create(model="tiny", input=TEXTS)  # base64 under way, as the client asks for it
    assert [row.index for row in reply.data] == [0, 1, 2, 3]
    for row in reply.data:
        assert len(row.embedding) == 32 and math.hypot(*row.embedding) == pytest.approx(1, abs=1e-5)
    assert reply.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    whole = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [row.embedding for row in whole.data] == [row.embedding for row in reply.data]


def test_alone_together_as_text_or_ids_it_is_the_same_vector(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    together = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float").data
    ids = [tokenizer.encode(text) for text in TEXTS]
    for given in (*TEXTS[:1], ids[0], ids[:1]):
        alone = client.embeddings.create(model="tiny", input=given, encoding_format="float").data[0].embedding
        assert alone == pytest.approx(together[0].embedding, abs=1e-5)


def test_fewer_dimensions_are_the_first_ones_again_of_length_one(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="tiny", input="x").data[0].embedding)
    short = client.embeddings.create(model="tiny", input="x", dimensions=8).data[0].embedding
    assert short == pytest.approx((whole[:8] / np.linalg.norm(whole[:8])).tolist(), abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="32 dimensions"):
        client.embeddings.create(model="tiny", input="x", dimensions=33)


def test_base64_is_little_endian_fp32(url: str) -> None:
    rows = [post(url, "/v1/embeddings", input="x", encoding_format=form)["data"][0] for form in ("float", "base64")]
    assert np.frombuffer(base64.b64decode(rows[1]["embedding"]), "<f4").tolist() == rows[0]["embedding"]


def test_what_cannot_be_embedded_is_refused(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    for wrong, why in (
        ([], "at least one text"),
        ("", "at least one token"),
        (["a", ""], "at least one token"),
        ("word " * CONTEXT, "context"),
        ([tokenizer.vocab_size], "vocabulary"),
    ):
        with pytest.raises(openai.BadRequestError, match=why):
            client.embeddings.create(model="tiny", input=wrong)
    body = {"truncate_prompt_tokens": -1}
    long = client.embeddings.create(model="tiny", input="word " * CONTEXT, extra_body=body)
    assert long.usage.prompt_tokens == CONTEXT


def test_documents_are_ranked_by_the_angle_to_the_query(url: str, client: openai.OpenAI) -> None:
    query, documents = "What is 17?", TEXTS
    vectors = [row.embedding for row in client.embeddings.create(model="tiny", input=[query, *documents]).data]
    expected = [cosine(vectors[0], vector) for vector in vectors[1:]]
    reply = post(url, "/rerank", query=query, documents=[documents[0], {"text": documents[1]}, *documents[2:]])
    results = reply["results"]
    assert [row["index"] for row in results] == sorted(range(4), key=lambda index: -expected[index])
    for row in results:
        assert row["relevance_score"] == pytest.approx(expected[row["index"]], abs=1e-5)
        assert row["document"] == {"text": documents[row["index"]]}
    for path in ("/v1/rerank", "/v2/rerank"):
        best = post(url, path, model="tiny", query=query, documents=documents, top_n=2, return_documents=False)
        assert [row["index"] for row in best["results"]] == [row["index"] for row in results[:2]]
        assert "document" not in best["results"][0]


def test_pairs_are_scored_one_with_all_or_each_with_its_own(url: str) -> None:
    one = post(url, "/score", text_1=TEXTS[0], text_2=TEXTS)
    assert [row["index"] for row in one["data"]] == [0, 1, 2, 3]
    assert one["data"][0]["score"] == pytest.approx(1, abs=1e-5)
    each = post(url, "/v1/score", model="tiny", text_1=TEXTS, text_2=TEXTS[::-1])
    assert each["data"][0]["score"] == pytest.approx(one["data"][3]["score"], abs=1e-5)
    assert each["data"][0]["score"] == pytest.approx(each["data"][3]["score"], abs=1e-5)
    reply = httpx.post(url + "/score", json={"text_1": TEXTS[:2], "text_2": TEXTS}, trust_env=False)
    assert reply.status_code == 400 and "it must be one, or as many" in reply.json()["error"]["message"]


def test_an_answer_goes_on_while_others_embed(url: str, client: openai.OpenAI) -> None:
    alone = client.completions.create(model="tiny", prompt="The", max_tokens=40, temperature=0)
    stream = client.completions.create(model="tiny", prompt="The", max_tokens=40, temperature=0, stream=True)
    text = ""
    for chunk in stream:
        client.embeddings.create(model="tiny", input="word " * 20)
        text += chunk.choices[0].text
    assert text == alone.choices[0].text


def test_a_text_may_be_given_in_all_the_ways_of_other_servers(url: str, tokenizer: Tokenizer) -> None:
    text, ids = TEXTS[0], tokenizer.encode(TEXTS[0])
    half = len(text) // 2
    forms = [
        text,
        {"prompt_string": text},
        {"content": [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]},
        [*ids[:2], tokenizer.decode(ids[2:])],
    ]
    rows = post(url, "/v1/embeddings", input=[*forms, ids])["data"]
    rows += [row for form in forms for row in post(url, "/v1/embeddings", input=form)["data"]]
    assert len(rows) == 9
    for row in rows:
        assert row["embedding"] == pytest.approx(rows[0]["embedding"], abs=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        [],
        {"content": "text"},
        {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        [[]],
        ["a", [1], 5],
        [1.5],
        [-1],
        [[-1]],
        [999999],
    ],
)
def test_what_is_no_text_is_refused(url: str, given: object) -> None:
    assert httpx.post(url + "/v1/embeddings", json={"input": given}, trust_env=False).status_code == 400


def test_a_conversation_is_embedded_as_its_template_writes_it(url: str, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    reply = post(url, "/v1/embeddings", messages=messages)
    ids = tokenizer.render(messages, generation_prompt=False)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    [row] = post(url, "/v1/embeddings", input=[ids])["data"]
    assert reply["data"][0]["embedding"] == pytest.approx(row["embedding"], abs=1e-5)


def test_a_vector_is_given_as_it_is_if_no_length_is_wanted(url: str) -> None:
    unit, raw = (post(url, "/v1/embeddings", input=TEXTS[0], use_activation=on)["data"][0] for on in (True, False))
    length = math.hypot(*raw["embedding"])
    assert length != pytest.approx(1, abs=0.1)
    assert unit["embedding"] == pytest.approx([number / length for number in raw["embedding"]], abs=1e-5)


def test_a_ranking_as_tei_gives_it(url: str) -> None:
    query, texts = TEXTS[0], TEXTS[1:]
    usual = post(url, "/rerank", query=query, documents=texts)["results"]
    ranked = post(url, "/rerank", query=query, texts=texts, return_text=True, raw_scores=False)
    assert [(row["index"], row["text"]) for row in ranked] == [(row["index"], texts[row["index"]]) for row in usual]
    assert [row["score"] for row in ranked] == pytest.approx([row["relevance_score"] for row in usual], abs=1e-5)
    assert len(post(url, "/rerank", query=query, texts=texts, top_n=1)) == 1


def test_which_end_of_a_long_text_goes(url: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[1])
    for side, kept in (("right", ids[:3]), ("left", ids[-3:])):
        cut = post(url, "/v1/embeddings", input=TEXTS[1], truncate_prompt_tokens=3, truncation_side=side)["data"][0]
        [row] = post(url, "/v1/embeddings", input=[kept])["data"]
        assert cut["embedding"] == pytest.approx(row["embedding"], abs=1e-5)


def test_scores_by_the_names_of_other_versions(url: str) -> None:
    usual = post(url, "/score", text_1=TEXTS[0], text_2=TEXTS[1:])["data"]
    for left, right in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        assert post(url, "/score", **{left: TEXTS[0], right: TEXTS[1:]})["data"] == usual
    both = {"text_1": "a", "queries": "b", "text_2": "c"}
    assert httpx.post(url + "/score", json=both, trust_env=False).status_code == 400


@pytest.mark.parametrize("order", ["native", "little", "big"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_bytes_have_the_number_format_that_is_asked_for(url: str, name: str, order: str) -> None:
    asked = {"input": TEXTS[0], "encoding_format": "base64", "embed_dtype": name, "endianness": order}
    raw = base64.b64decode(post(url, "/v1/embeddings", **asked)["data"][0]["embedding"])
    words = np.frombuffer(
        raw, {"native": "=", "little": "<", "big": ">"}[order] + ("u4" if name == "float32" else "u2")
    )
    kept = torch.from_numpy(words.astype("=i4" if name == "float32" else "=i2")).view(getattr(torch, name))
    expected = post(url, "/v1/embeddings", input=TEXTS[0])["data"][0]["embedding"]
    assert kept.float().tolist() == pytest.approx(expected, abs=1e-2)


def test_single_tokens_are_embedded_where_the_server_does_not_pool(model_folder: Path, tokenizer: Tokenizer) -> None:
    with open_server(model_folder, port=0, engine=SMALL, settings=Settings(pooling="none")) as server:
        found = httpx.post(server.url + "/embeddings", json={"input": TEXTS[:2]}, trust_env=False, timeout=60).json()
        assert [each["index"] for each in found] == [0, 1]
        assert [len(each["embedding"]) for each in found] == [len(tokenizer.encode(text)) for text in TEXTS[:2]]
        assert {len(row) for each in found for row in each["embedding"]} == {32}
        for path, asked in (
            ("/v1/embeddings", {"input": "a"}),
            ("/rerank", {"query": "a", "documents": ["b"]}),
        ):
            refused = httpx.post(server.url + path, json=asked, trust_env=False, timeout=60)
            assert refused.status_code == 400 and "single tokens" in refused.json()["error"]["message"]

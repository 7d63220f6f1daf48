"""Embeddings: what `transformers` gives for the last hidden states, pooled, however a text is cut into steps."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from liaoyuan.checkpoint import save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Pooling, embedding_steps, read_pooling
from liaoyuan.inference.spread.memory import OwnMemory
from liaoyuan.models import Decoder

TEXTS = [[5, 17, 80], [1], list(range(1, 90)), [9] * 7, [3, 3, 94, 12, 50, 61, 7, 8]]


def embed(model: Decoder, texts: list[list[int]], pooling: Pooling, most: int) -> torch.Tensor:
    found = dict(pair for step in embedding_steps(texts, pooling, most) for pair in step(model, OwnMemory(model)))
    assert found.keys() == set(range(len(texts)))
    return torch.stack([found[number] for number in range(len(texts))])


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_an_embedding_is_the_pooled_state_that_transformers_gives(tiny_model: Decoder, tmp_path: Path, mode) -> None:
    save_model(tiny_model, tmp_path / "model")
    theirs = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = embed(tiny_model, TEXTS, Pooling(mode), 1000)
    for row, text in zip(ours, TEXTS, strict=True):
        with torch.no_grad():
            states = theirs(torch.tensor([text])).last_hidden_state[0]
        pooled = states[-1] if mode == "last" else states.mean(0)
        torch.testing.assert_close(row, pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 7, 16, 40, 96])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_no_step_is_longer_than_the_most_and_the_cut_does_not_matter(tiny_model: Decoder, most: int, mode) -> None:
    whole = embed(tiny_model, TEXTS, Pooling(mode), 1000)
    seen: list[int] = []
    embed_tokens = tiny_model.embed_tokens
    hook = embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(embed(tiny_model, TEXTS, Pooling(mode), most), whole, atol=1e-5, rtol=1e-4)
    hook.remove()
    assert max(seen) <= most and sum(seen) == sum(map(len, TEXTS))


def test_the_folder_says_how_to_pool(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling("mean")
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    for name, mode in (("lasttoken", "last"), ("mean_tokens", "mean")):
        file.write_text(
            json.dumps({"word_embedding_dimension": 8, f"pooling_mode_{name}": True, "pooling_mode_x": False})
        )
        assert read_pooling(tmp_path) == Pooling(mode)
    for wrong in ({"pooling_mode_cls_token": True}, {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(LiaoyuanError, match="this server knows"):
            read_pooling(tmp_path)


@pytest.mark.parametrize("most", [7, 1000])
def test_without_pooling_there_is_a_state_for_every_token(tiny_model: Decoder, most: int) -> None:
    steps = embedding_steps(TEXTS, Pooling("none"), most)
    found = dict(pair for step in steps for pair in step(tiny_model, OwnMemory(tiny_model)))
    assert [len(found[number]) for number in range(len(TEXTS))] == [len(text) for text in TEXTS]
    means = torch.stack([found[number].mean(0) for number in range(len(TEXTS))])
    torch.testing.assert_close(means, embed(tiny_model, TEXTS, Pooling("mean"), 1000), atol=1e-5, rtol=1e-4)

"""How large a cache is where nobody says it."""

import pytest

from liaoyuan.device import Device
from liaoyuan.inference.sizes import EngineConfig, num_blocks
from liaoyuan.models import Decoder

MANY = EngineConfig(max_sequences=100_000)


def test_without_a_card_it_is_a_gibibyte(tiny_model: Decoder) -> None:
    assert num_blocks(tiny_model, MANY.model_copy(update={"cache_bytes": None})) == num_blocks(tiny_model, MANY)


def test_a_card_gives_most_of_what_is_free_to_both_models(tiny_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "free_memory", lambda self: 2**24)
    shape = tiny_model.config
    heads = shape.num_key_value_heads * (shape.head_dim + shape.value_head_dim)
    block = 16 * shape.num_hidden_layers * heads * shape.torch_dtype.itemsize
    asked = MANY.model_copy(update={"cache_bytes": None})
    blocks = num_blocks(tiny_model, asked)
    assert 0.8 * 2**24 < blocks * block <= 0.85 * 2**24
    assert num_blocks(tiny_model, asked, tiny_model) == blocks // 2
    assert num_blocks(tiny_model, asked.model_copy(update={"cache_tokens": 160})) == 10

"""What all tests share: one thread, and tiny models."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.accelerator.is_available():  # Triton, which torch imports with much else, asks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.ops import seek_exactness

torch.set_num_threads(1)
# A busy machine is no failure, and the same code is judged by the same examples.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

ROOT = Path(__file__).parents[1]


def slow_if(is_slow: bool, *row: Any, name: str | None = None) -> Any:
    """Return a row of a table of parameters, marked `slow` if it is: what it says, others say too."""
    return pytest.param(*row, id=name, marks=pytest.mark.slow if is_slow else [])


@pytest.fixture(autouse=True, scope="module")
def who_asks_for_exactness_asks_for_itself() -> Iterator[None]:
    """It holds for the whole process, which the tests of other files share."""
    yield
    seek_exactness(False)


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A Qwen3 decoder of two layers with grouped queries, fp32."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_id=0,
    )


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> Decoder:
    """The decoder of `tiny_config` with random weights (wide enough for log-probabilities that differ)."""
    return randomised(tiny_config, seed=0)


def randomised(config: ModelConfig, seed: int) -> Decoder:
    """Return a decoder with random weights, norms and biases included."""
    model = initialise(Decoder(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()

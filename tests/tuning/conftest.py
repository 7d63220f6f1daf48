"""A tokenizer and a model folder small enough to be tuned in seconds."""

from pathlib import Path

import pytest

from liaoyuan.checkpoint import save_model
from liaoyuan.data import Tokenizer, train_tokenizer
from liaoyuan.models import Decoder, ModelConfig, initialise


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["12+34=?\n", "the answer"], 263 + 8).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def small_config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_id=tokenizer.eos_ids[0],
    )


@pytest.fixture
def small_model(tokenizer: Tokenizer) -> Decoder:
    return initialise(Decoder(small_config(tokenizer)), seed=0).eval()


@pytest.fixture
def model_folder(small_model: Decoder, tokenizer_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    save_model(small_model, folder, tokenizer_folder)
    return folder

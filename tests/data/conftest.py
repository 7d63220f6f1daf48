"""A small tokenizer and a small folder of text, made once."""

from pathlib import Path

import pytest

from liaoyuan.data import Tokenizer, train_tokenizer

SENTENCES = [
    "def add(left, right):\n    return left + right  # 12 and 345\n",
    "The quick brown fox jumps over the lazy dog, 67 times.\n",
    "星星之火，可以燎原。从一台笔记本到一万张卡。\n",
    "naïve café — “quotes”, emoji 🙂👩‍👩‍👧, tabs\tand  spaces\r\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([sentence * 3 for sentence in SENTENCES], vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Forty different documents of some 200 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        text = f"Document {number}\n" + SENTENCES[number % 4] * 2 + f"value = {number * number}\n" * 5
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder

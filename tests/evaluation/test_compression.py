"""Bits per byte: equal to the sum over tokens, and to the command-line compressors."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from liaoyuan.evaluation import bits_per_byte, gzip_bits_per_byte, score, xz_bits_per_byte
from liaoyuan.models import Decoder


def documents(lengths: list[int]) -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 96, length + 1), 3 * length) for length in lengths]


def test_within_one_window_it_is_the_mean_score(tiny_model: Decoder) -> None:
    given = documents([50, 1, 120, 7])
    nats = -sum(sum(values) for values in score(tiny_model, [ids.tolist() for ids, _ in given]))
    expected = nats / math.log(2) / sum(size for _, size in given)
    assert bits_per_byte(tiny_model, given, window=128) == pytest.approx(expected, rel=1e-5)


def test_a_long_document_counts_every_token_once(tiny_config) -> None:  # type: ignore[no-untyped-def]
    uniform = Decoder(tiny_config)
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()  # every token then costs log2(vocabulary) bits
    for length in (64, 65, 100, 1000, 1023):
        expected = length * math.log2(96) / (3 * length)
        assert bits_per_byte(uniform, documents([length]), window=64) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("tool", "ours"), [("gzip", gzip_bits_per_byte), ("xz", xz_bits_per_byte)])
def test_compressors_need_what_the_commands_need(tool: str, ours, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if not shutil.which(tool):
        pytest.skip(f"the command {tool} is not installed")
    text = b"".join(path.read_bytes() for path in sorted((Path(__file__).parents[1]).rglob("*.py")))
    done = subprocess.run([tool, "-9", "-c"], input=text, capture_output=True, check=True)
    assert ours(text) == pytest.approx(8 * len(done.stdout) / len(text), rel=1e-2)

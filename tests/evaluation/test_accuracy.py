"""Judging: an answer counts only if it is whole, after one thought, and right."""

from pathlib import Path

import pytest

from liaoyuan.data import Tokenizer, train_tokenizer
from liaoyuan.evaluation import completions_of, measure_accuracy, read_rollout
from liaoyuan.inference import Completion, Engine
from liaoyuan.models import Decoder, ModelConfig, initialise
from liaoyuan.tasks import Problem, Right, Rollout, find_task

PROBLEM = Problem("addition", "3+4=?", "7", "3407,", 1, "addition:3+4=?")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["3+4=?"], 271).save(folder)
    return Tokenizer.load(folder)


RIGHT = Right(find_task("addition"))


def rollout_of(tokenizer: Tokenizer, tokens: list[int], thinking: bool = True) -> Rollout:
    return read_rollout(tokenizer, PROBLEM, Completion(0, tokens, [0.0] * len(tokens), "stop"), thinking)


def test_what_counts_as_right(tokenizer: Tokenizer) -> None:
    assert tokenizer.think_ids is not None
    close, end = tokenizer.think_ids[1], tokenizer.eos_ids[0]
    thought, seven = tokenizer.encode("3407,"), tokenizer.encode("7")
    assert RIGHT(rollout_of(tokenizer, [*thought, close, *seven, end])).is_right
    assert RIGHT(rollout_of(tokenizer, [close, *seven, end])).is_right
    assert RIGHT(rollout_of(tokenizer, [*seven, end], thinking=False)).is_right
    wrong = [
        [],
        [*thought, close, *seven],  # cut off
        [*thought, *seven, end],  # the thought is never closed
        [*thought, close, close, *seven, end],
        [*thought, close, *seven, *tokenizer.think_ids, end],
        [*thought, close, *seven, *seven, end],
        [*thought, close, end],
        [*thought, close, *tokenizer.encode("8"), end],
    ]
    assert [RIGHT(rollout_of(tokenizer, tokens)).value for tokens in wrong] == [0.0] * len(wrong)


def test_measures_are_a_function_of_the_seed(tokenizer: Tokenizer) -> None:
    config = ModelConfig("qwen3", tokenizer.vocab_size, 16, 32, 1, 2, 1, 8, max_position_embeddings=64, qk_norm=True)
    engine = Engine(initialise(Decoder(config), 0).eval())
    problems = [PROBLEM, Problem("addition", "2+2=?", "4", "", 2, "x")]
    first, again = (completions_of(engine, tokenizer, problems, 3, 1.0, seed=5, max_tokens=9) for _ in range(2))
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert len({tuple(one.tokens) for one in first}) > 1
    answers = measure_accuracy(engine, tokenizer, RIGHT, problems, samples=3, max_tokens=9)
    assert answers.sampled.shape == (2, 3) and answers.greedy.shape == (2,)
    assert answers.levels.tolist() == [1, 2] and answers.pass_at_k.shape == (2,)

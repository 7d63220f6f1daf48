"""Guessing next tokens of a model over several processes: the answers that come without it, in fewer steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine, EngineConfig
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import ModelConfig, Quantisation, config_from_dict
from liaoyuan.parallel import Layout
from tests.conftest import randomised, slow_if
from tests.inference.test_further_draft import COMMON, FAMILIES, FURTHER, MTP
from tests.inference.test_ranks import on_ranks
from tests.inference.test_speculation import asked, said
from tests.parallel.layouts import MODELS

ROOM = {"vocab_size": 96, "max_position_embeddings": 256}
TIGHT = {"max_batch_tokens": 9, "max_sequences": 4, "cache_tokens": 144}  # small chunks, preemption
Told = tuple[list[Completion], dict[str, Any]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Path]:
    def folder(config: ModelConfig) -> Path:
        made: Path = tmp_path_factory.mktemp("guessing") / "model"
        save_model(randomised(config, 0), made)
        return made

    return folder


def drafted(leader: Leader, folder: Path, sizes: dict[str, int]) -> Told:
    """Return what is answered with a draft model, and the engine's counts."""
    engine = Engine(leader.model, EngineConfig(speculate_tokens=4, **sizes), load_model(folder), leader)
    return engine.generate(asked(8)), engine.statistics()


def same(together: list[Completion], alone: list[Completion]) -> None:
    assert said(together) == said(alone)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("how", [slow_if(True, None, name="whole"), slow_if(False, Quantisation("int8"), name="int8")])
def test_a_draft_model_changes_no_answer(folder_of: Callable[[ModelConfig], Path], how: Quantisation | None) -> None:
    config = config_from_dict(MODELS["dense"] | ROOM)
    folder, small = folder_of(config), folder_of(dataclasses.replace(config, num_hidden_layers=1))
    found, counts = on_ranks(2, folder, Layout(tp=2), drafted, small, TIGHT if how else {}, few_bits=how)
    same(found, Engine(load_model(folder, quantisation=how)).generate(asked(8)))
    assert counts["guessed_tokens"] > 50 and counts["free_blocks"] == counts["blocks"]


def test_a_draft_model_of_the_same_weights_is_right(folder_of: Callable[[ModelConfig], Path]) -> None:
    folder = folder_of(config_from_dict(MODELS["dense"] | ROOM))
    alone = Engine(load_model(folder))
    found, counts = on_ranks(2, folder, Layout(tp=2), drafted, folder, {})
    same(found, alone.generate(asked(8)))
    # Guesses know of no constraint, which one in eight of the requests has.
    assert counts["guessed_right"] > 0.8 * counts["guessed_tokens"]
    assert counts["steps"] < 0.7 * alone.statistics()["steps"]


def foreign(leader: Leader, folder: Path) -> str:
    with pytest.raises(LiaoyuanError) as refused:
        Engine(leader.model, EngineConfig(), load_model(folder), leader)
    engine = Engine(leader.model, EngineConfig(), memory=leader)
    assert engine.generate(asked(3))  # all processes go on
    return str(refused.value)


def test_a_draft_model_of_another_vocabulary_is_refused(folder_of: Callable[[ModelConfig], Path]) -> None:
    config = config_from_dict(MODELS["dense"] | ROOM)
    folder, other = folder_of(config), folder_of(dataclasses.replace(config, vocab_size=64))
    assert "both must have the same vocabulary" in on_ranks(2, folder, Layout(tp=2), foreign, other)


def guess_further(leader: Leader, sizes: dict[str, int]) -> tuple[Told, Told]:
    engine = Engine(leader.model, MTP.model_copy(update=sizes), memory=leader)
    first = engine.generate(asked(8)), engine.statistics()
    return first, (engine.generate(asked(8)[-2:], keep_prefixes=True), engine.statistics())


@pytest.mark.parametrize(
    ("family", "layout", "how", "sizes"),
    [
        ("deepseek_v3", Layout(tp=2, ep=2), Quantisation("int8"), {}),
        ("glm4_moe", Layout(tp=2), None, TIGHT),
    ],
)
def test_guessing_further_makes_the_guesses_of_one_process(
    folder_of: Callable[[ModelConfig], Path],
    family: str,
    layout: Layout,
    how: Quantisation | None,
    sizes: dict[str, int],
) -> None:
    """Sums in another order may move a guess, so a few may differ, and no answer."""
    folder = folder_of(config_from_dict({"model_type": family} | COMMON | FAMILIES[family] | FURTHER, further=True))
    alone = Engine(load_model(folder, quantisation=how, further=True), MTP.model_copy(update=sizes))
    plain = alone.generate(asked(8))
    wanted = alone.statistics()
    assert said(plain) == said(Engine(load_model(folder, quantisation=how)).generate(asked(8)))
    (found, counts), (again, last) = on_ranks(2, folder, layout, guess_further, sizes, few_bits=how, further=True)
    same(found, plain)
    same(again, plain[-2:])
    for name in ("guessed_tokens", "guessed_right", "steps"):
        assert abs(counts[name] - wanted[name]) <= 0.05 * wanted[name]
    assert last["free_blocks"] == last["blocks"]

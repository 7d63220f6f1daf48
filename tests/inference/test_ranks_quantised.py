"""Weights of few bits over several processes: the numbers of one process, cut; its answers; and what cannot be cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, quantisation_for, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.inference.weights import weights_checksum
from liaoyuan.models import Quantisation, config_from_dict
from liaoyuan.models.config import read_config
from liaoyuan.parallel import Layout, check_inference
from tests.conftest import randomised, slow_if
from tests.inference.test_ranks import SIZES, asked, generate, on_ranks, rows
from tests.parallel.layouts import MODELS

WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "q_lora_rank": 64, "head_dim": 16}
INT8, INT4, FP8 = Quantisation("int8"), Quantisation("int4"), Quantisation("fp8")
WAYS = [
    ("dense", 2, Layout(tp=2), INT8),
    ("dense", 2, Layout(tp=2), INT4),
    ("dense", 2, Layout(tp=2), FP8),
    ("dense", 2, Layout(tp=2), Quantisation("int4", 64, symmetric=False, head=None)),
    ("tied", 4, Layout(tp=4), INT8),
    ("tied", 2, Layout(tp=2), INT4),
    ("experts", 2, Layout(tp=2), INT4),
    ("experts", 2, Layout(tp=2, ep=2), INT8),
    ("experts", 4, Layout(tp=4, ep=2), INT4),
    ("latent", 2, Layout(tp=2, ep=2), Quantisation("int8", head=None)),
    ("sinks", 4, Layout(tp=4, ep=2), FP8),
]
IDS = [f"{kind}-{layout.describe()}-{how.kind}-{how.group_size}" for kind, _, layout, how in WAYS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def folder(kind: str, seed: int = 0) -> Path:
        words = MODELS[kind] | {name: size for name, size in WIDE.items() if name in MODELS[kind]}
        made: Path = tmp_path_factory.mktemp(kind) / "model"
        save_model(randomised(config_from_dict(words), seed), made)
        return made

    return folder


def weights_and_answers(leader: Leader) -> tuple[str, list[Completion]]:
    engine = Engine(leader.model, SIZES, memory=leader)
    return engine.checksum(), engine.generate(asked())


def check_answers(together: list[Completion], alone: list[Completion]) -> None:
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)
        if one.prompt and other.prompt:
            found, wanted = torch.tensor(one.prompt.logprobs), torch.tensor(other.prompt.logprobs)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "size", "layout", "how"), rows(WAYS, IDS, (3, 4, 8, 9, 10)))
def test_the_numbers_and_answers_of_one_process(
    folder_of: Callable[..., Path], kind: str, size: int, layout: Layout, how: Quantisation
) -> None:
    """The checksum is that of all steps, scales and zeros: they are the same ones to the last bit."""
    folder = folder_of(kind)
    whole = load_model(folder, quantisation=how)
    checksum, together = on_ranks(size, folder, layout, weights_and_answers, few_bits=how)
    assert checksum == weights_checksum(whole)
    check_answers(together, Engine(whole, SIZES).generate(asked()))


@pytest.mark.parametrize(("kind", "how"), [("dense", INT4), ("experts", INT8)], ids=["dense-int4", "experts-int8"])
def test_a_folder_of_few_bits_is_served_as_it_is(
    folder_of: Callable[..., Path], tmp_path: Path, kind: str, how: Quantisation
) -> None:
    save_model(load_model(folder_of(kind), quantisation=how), tmp_path / "few")
    whole = load_model(tmp_path / "few")
    kept = quantisation_for(tmp_path / "few", None)
    checksum, together = on_ranks(2, tmp_path / "few", Layout(tp=2), weights_and_answers, few_bits=kept)
    assert checksum == weights_checksum(whole)
    check_answers(together, Engine(whole, SIZES).generate(asked()))
    with pytest.raises(LiaoyuanError, match="quantised already"):
        quantisation_for(tmp_path / "few", how)


def test_one_layout_gives_the_same_bits_in_every_batch(folder_of: Callable[..., Path]) -> None:
    if not ops.exact_rows():
        pytest.skip("without native kernels a row's bits depend on others")
    tight = SIZES.model_copy(update={"cache_tokens": 96, "max_batch_tokens": 9})  # small chunks, preemption
    folder, layout = folder_of("experts"), Layout(tp=2, ep=2)
    (whole,) = on_ranks(2, folder, layout, generate, SIZES, asked(), few_bits=INT8)
    apart = on_ranks(2, folder, layout, generate, tight, *[[request] for request in asked()], few_bits=INT8)
    assert [completion for (completion,) in apart] == whole


def updates(leader: Leader, folders: list[Path]) -> list[tuple[str, list[Completion]] | str]:
    """Return checksum and answers, or the refusal, after each update; the last one comes after a sleep without any."""
    engine, found = Engine(leader.model, SIZES, memory=leader), []
    for number, folder in enumerate(folders):
        if number == len(folders) - 1:
            engine.sleep(without_weights=True)
            engine.wake()
        try:
            engine.update_weights(folder)
            engine.resume()
            found.append((engine.checksum(), engine.generate(asked())))
        except LiaoyuanError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kind", ["experts", slow_if(True, "tied")])
def test_new_weights_are_quantised_as_they_come_in_all_processes_or_in_none(
    folder_of: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    first, second, wrong = folder_of(kind), folder_of(kind, 1), tmp_path / "wrong"
    spoilt = load_model(second)
    with torch.no_grad():
        spoilt.layers[1].self_attn.o_proj.weight[3, -1] = torch.inf  # a column of the second process
    save_model(spoilt, wrong)
    save_model(load_model(second, quantisation=INT8), tmp_path / "other")
    folders = [second, wrong, tmp_path / "other", first]
    new, refused, other, last = on_ranks(2, first, Layout(tp=2), updates, folders, few_bits=INT4)
    wanted = load_model(second, quantisation=INT4)
    assert new[0] == weights_checksum(wanted)
    check_answers(new[1], Engine(wanted, SIZES).generate(asked()))
    assert "infinite" in refused or "not numbers" in refused
    assert "another model" in other or "quantised to int8" in other
    assert last[0] == weights_checksum(load_model(first, quantisation=INT4))


def test_a_cut_that_splits_a_group_is_refused(folder_of: Callable[..., Path]) -> None:
    config = config_from_dict(MODELS["dense"])
    with pytest.raises(
        LiaoyuanError, match=r"2 of them share the 64 inputs of layers\.0\.self_attn\.o_proj\.weight, 32"
    ):
        check_inference(Layout(tp=2), config, Quantisation("int4", 64))
    with pytest.raises(
        LiaoyuanError, match=r"the 48 inputs of layers\.0\.mlp\.down_proj\.weight, 24 each, which splits"
    ):
        check_inference(Layout(tp=2), config, INT4)
    check_inference(Layout(tp=2), config, INT8)
    experts = read_config(folder_of("experts"))
    with pytest.raises(LiaoyuanError, match=r"the 64 inputs of layers\.0\.mlp\.experts\.down_proj, 16 each"):
        check_inference(Layout(tp=4), experts, INT4)
    check_inference(Layout(tp=4, ep=4), experts, INT4)

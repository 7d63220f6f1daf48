"""Low-rank adapters of a model over several processes: one process's answers; loaded in all of them, or in none."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liaoyuan import ops
from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.evaluation import score
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import Quantisation, config_from_dict
from liaoyuan.parallel import Layout
from tests.conftest import randomised
from tests.inference.adapter_files import ALL, ATTENTION, write_adapter
from tests.inference.test_adapters import broken
from tests.inference.test_ranks import SIZES, on_ranks, prompts, rows
from tests.parallel.layouts import MODELS

LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
INT8 = Quantisation("int8")
KINDS: list[tuple[str, int, Layout, tuple[str, ...], Quantisation | None]] = [
    ("dense", 2, Layout(tp=2), ALL, None),
    ("dense", 2, Layout(tp=2), ALL, INT8),
    ("tied", 4, Layout(tp=4), ALL, None),
    ("experts", 2, Layout(tp=2, ep=2), ATTENTION, None),
    ("latent", 2, Layout(tp=2, ep=2), LATENT, None),
    ("latent", 2, Layout(tp=2), LATENT, INT8),
]
IDS = [f"{kind}-{layout.describe()}{'-int8' if how else ''}" for kind, _, layout, _, how in KINDS]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[str, ...]], tuple[Path, Folders]]:
    """Give a model of a kind, and adapters of it: two of one shape, one of another rank, one of other projections."""

    def folders(kind: str, targets: tuple[str, ...]) -> tuple[Path, Folders]:
        made = tmp_path_factory.mktemp(kind)
        save_model(randomised(config_from_dict(MODELS[kind]), 0), made / "model")
        shapes = {"a": (targets, 4), "b": (targets, 4), "c": (targets, 2), "d": (targets[-1:], 3)}
        return made / "model", {
            name: write_adapter(made / name, made / "model", of, rank, seed)
            for seed, (name, (of, rank)) in enumerate(shapes.items())
        }

    return folders


def asked(names: tuple[str, ...] = ("a", "", "b", "c", "d")) -> list[Request]:
    rules = itertools.cycle([{}, {"temperature": 0.0, "prompt_logprobs": 1}])
    return [
        Request(number, prompt, SamplingParams(12, seed=number, top_logprobs=2, **rule), adapter=name)
        for number, (prompt, name, rule) in enumerate(zip(prompts() * 2, itertools.cycle(names), rules, strict=False))
    ]


def answers(engine: Engine, folders: Folders, requests: list[Request]) -> list[Completion]:
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return engine.generate(requests)


def answers_together(leader: Leader, folders: Folders, requests: list[Request]) -> list[Completion]:
    return answers(Engine(leader.model, SIZES, memory=leader), folders, requests)


@pytest.mark.parametrize(("kind", "size", "layout", "targets", "how"), rows(KINDS, IDS, (1, 2, 3, 5)))
def test_the_answers_of_one_process(
    folders_of: Callable[..., tuple[Path, Folders]],
    kind: str,
    size: int,
    layout: Layout,
    targets: tuple[str, ...],
    how: Quantisation | None,
) -> None:
    model, folders = folders_of(kind, targets)
    alone = answers(Engine(load_model(model, quantisation=how), SIZES), folders, asked())
    together = on_ranks(size, model, layout, answers_together, folders, asked(), few_bits=how)
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=2e-4, atol=2e-4)
        if one.prompt and other.prompt:
            found, wanted = torch.tensor(one.prompt.logprobs), torch.tensor(other.prompt.logprobs)
            torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
    same = [dataclasses.replace(request, prompt=(1, 2, 3)) for request in asked()[:5]]
    assert len({tuple(x.tokens) for x in answers(Engine(load_model(model), SIZES), folders, same)}) == 5


def each_alone(leader: Leader, folders: Folders) -> tuple[list[Completion], list[Completion]]:
    engine = Engine(leader.model, SIZES, memory=leader)
    whole = answers(engine, folders, asked())
    tight = Engine(leader.model, SIZES.model_copy(update={"max_batch_tokens": 9, "cache_tokens": 96}), memory=leader)
    for name in reversed(folders):
        tight.load_adapter(name, folders[name])
    return whole[:10], [tight.generate([request])[0] for request in asked()[:10]]  # each adapter by each rule


def test_the_same_bits_in_every_batch(folders_of: Callable[..., tuple[Path, Folders]]) -> None:
    if not ops.exact_rows():
        pytest.skip("without native kernels a row's bits depend on others")
    model, folders = folders_of("dense", ALL)
    whole, alone = on_ranks(2, model, Layout(tp=2), each_alone, folders)
    assert whole == alone


def come_and_go(engine: Engine, folders: Folders) -> list[object]:
    """Return what is told while adapters are loaded and unloaded between steps, and what memory they take at last."""
    told: list[object] = []
    wanted = {request.adapter: dataclasses.replace(request, prompt=(1, 2, 3)) for request in asked()[:5]}
    engine.load_adapter("a", folders["a"])
    for name in ("a", "", "b", "c", "a"):
        if name and name not in [one.name for one in engine.adapters.loaded()]:
            engine.load_adapter(name, folders[name])
        engine.add(dataclasses.replace(wanted[name], id=f"{name}-{len(told)}"))
        told += [(event.id, event.tokens) for event in engine.step()]
        if name == "a":
            engine.unload_adapter("a")
    engine.load_adapter("a", folders["b"])  # the name is free at once; who runs keeps the old one
    engine.add(dataclasses.replace(wanted["a"], id="new"))
    while engine.has_work:
        told += [(event.id, event.tokens) for event in engine.step()]
    for name in ("a", "b", "c"):
        engine.unload_adapter(name)
    return [*told, engine.adapters.nbytes, bool(engine.adapters)]


def come_and_go_together(leader: Leader, folders: Folders) -> list[object]:
    return come_and_go(Engine(leader.model, SIZES, memory=leader), folders)


def test_they_come_and_go_while_requests_run(folders_of: Callable[..., tuple[Path, Folders]]) -> None:
    model, folders = folders_of("dense", ALL)
    found = on_ranks(2, model, Layout(tp=2), come_and_go_together, folders)
    assert found == come_and_go(Engine(load_model(model), SIZES), folders)
    assert found[-2:] == [0, False]


def refusals(leader: Leader, folders: Folders, wrong: list[Path]) -> tuple[list[str], list[Completion]]:
    engine, said = Engine(leader.model, SIZES, memory=leader), []
    engine.load_adapter("a", folders["a"])
    for folder in wrong:
        with pytest.raises(LiaoyuanError) as refused:
            engine.load_adapter("x", folder)
        said.append(str(refused.value))
    said += [one.name for one in engine.adapters.loaded()]
    engine.load_adapter("b", folders["b"])
    return said, engine.generate(asked(("a", "", "b")))


def test_a_wrong_adapter_is_refused_and_all_go_on(
    folders_of: Callable[..., tuple[Path, Folders]], tmp_path: Path
) -> None:
    model, folders = folders_of("dense", ALL)
    kinds = ("torn", "lacks a half", "another size", "not finite", '{"use_dora": true}')
    wrong = []
    for number, kind in enumerate(kinds):
        wrong.append(write_adapter(tmp_path / str(number), model, seed=number))
        broken(wrong[-1], kind)
    said, found = on_ranks(2, model, Layout(tp=2), refusals, folders, wrong)
    for sentence, word in zip(
        said, ("corrupt", "only lora_A", "this model and rank 4 need", "infinite", "DoRA", "a"), strict=True
    ):
        assert word in sentence
    alone = answers(Engine(load_model(model), SIZES), {name: folders[name] for name in "ab"}, asked(("a", "", "b")))
    assert [x.tokens for x in found] == [x.tokens for x in alone]


def scores(leader: Leader, folders: Folders) -> list[list[list[float]]]:
    engine = Engine(leader.model, EngineConfig(max_sequences=4), memory=leader)
    engine.load_adapter("a", folders["a"])
    found = []
    for name in ("", "a", ""):
        with engine.adapters.everywhere(name):
            found.append(score(engine.model, [list(range(1, 30)), [5, 4, 3]]))
    return found


def test_a_pass_of_whole_texts_has_the_adapter_in_all_processes(
    folders_of: Callable[..., tuple[Path, Folders]],
) -> None:
    model, folders = folders_of("tied", ALL)
    plain, adapted, again = on_ranks(2, model, Layout(tp=2), scores, folders)
    engine = Engine(load_model(model))
    engine.load_adapter("a", folders["a"])
    assert plain == again != adapted
    for name, found in (("", plain), ("a", adapted)):
        with engine.adapters.everywhere(name):
            wanted = score(engine.model, [list(range(1, 30)), [5, 4, 3]])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=2e-4, atol=2e-4)

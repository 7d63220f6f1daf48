"""A model spread over several processes answers as one process does, and the same in every batch to the last bit."""

import shutil
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from liaoyuan.checkpoint import load_model, load_weights, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from liaoyuan.inference.cache import KeyValueCache, PagedContext
from liaoyuan.inference.spread.balance import Balancing
from liaoyuan.inference.spread.message import FIRST, decode, encode
from liaoyuan.inference.spread.mirror import Leader, follow
from liaoyuan.inference.spread.ranks import open_ranks
from liaoyuan.models import Decoder, Quantisation, config_from_dict, read_config
from liaoyuan.models.context import packed_context
from liaoyuan.parallel import Layout, World, check_inference, inference, lay_out_inference
from liaoyuan.parallel.inference import ordered_sum
from tests.conftest import randomised, slow_if
from tests.parallel.layouts import MODELS
from tests.parallel.processes import run

SIZES = EngineConfig(max_sequences=8, max_batch_tokens=24, block_size=4)


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 17, 1, 9, 30, 5, 12, 8]
    return [tuple(torch.randint(1, 64, (length,), generator=generator).tolist()) for length in lengths]


def asked() -> list[Request]:
    """Return requests of which some are scored and some drawn by other rules: an engine does that in one place."""
    rules = [
        {},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "bad_words": ((20,), (46, 46))},
    ]
    return [
        Request(number, prompt, SamplingParams(12, seed=number, top_logprobs=2, **rules[number % 3]))
        for number, prompt in enumerate(prompts())
    ]


def on_ranks(
    size: int,
    folder: Path,
    layout: Layout,
    job: Callable[..., Any],
    *arguments: Any,
    few_bits: Quantisation | None = None,
    further: bool = False,
    balancing: Balancing = Balancing(),
) -> Any:
    """Return what `job(leader, *arguments)` gives in the first of `size` processes, which the others follow."""
    return run(size, work_together, folder, layout, job, arguments, few_bits, further, balancing)[0]


def work_together(
    world: World,
    folder: Path,
    layout: Layout,
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
    few_bits: Quantisation | None = None,
    further: bool = False,
    balancing: Balancing = Balancing(),
) -> Any:
    """Return what `job(leader, *arguments)` gives in the first process, which this one follows otherwise."""
    config = read_config(folder, further)
    world = world.arrange(check_inference(layout, config, few_bits, balancing.copies))
    with torch.device("meta"):
        model = Decoder(config).eval()
    program = lay_out_inference(model, layout, world, few_bits, balancing.copies)
    load_weights(program, folder)
    control = dist.new_group(backend="gloo")
    if world.rank:
        return follow(program, control)
    leader = Leader(program, control, print, balancing.seconds)
    try:
        return job(leader, *arguments)
    finally:
        leader.close()


def generate(leader: Leader, sizes: EngineConfig, *lists: list[Request]) -> list[list[Completion]]:
    engine = Engine(leader.model, sizes, memory=leader)
    return [engine.generate(requests) for requests in lists]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(kind: str, seed: int = 0) -> Path:
        made: Path = tmp_path_factory.mktemp(kind)
        save_model(randomised(config_from_dict(MODELS[kind]), seed), made / "model")
        return made / "model"

    return folder


LAYOUTS = [
    ("dense", 2, Layout(tp=2)),
    ("tied", 4, Layout(tp=4)),
    ("experts", 2, Layout(tp=2)),
    ("experts", 2, Layout(tp=2, ep=2)),
    ("experts", 4, Layout(tp=4, ep=2)),
    ("latent", 2, Layout(tp=2, ep=2)),
    ("sinks", 4, Layout(tp=4, ep=2)),
]


def rows(table: Sequence[tuple[Any, ...]], ids: Sequence[str], quick: Container[int]) -> list[Any]:
    """Return the rows of a table of layouts, of which those at these places are quick."""
    return [slow_if(place not in quick, *row, name=ids[place]) for place, row in enumerate(table)]


IDS = [f"{kind}-{layout.describe()}" for kind, _, layout in LAYOUTS]


@pytest.mark.parametrize(("kind", "size", "layout"), rows(LAYOUTS, IDS, (0, 1, 4, 5, 6)))
def test_the_answers_of_one_process(folder_of: Callable[[str], Path], kind: str, size: int, layout: Layout) -> None:
    folder = folder_of(kind)
    alone = Engine(load_model(folder), SIZES).generate(asked())
    (together,) = on_ranks(size, folder, layout, generate, SIZES, asked())
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.prompt is None) == (other.prompt is None)
        pairs = [(one.logprobs, other.logprobs)]
        pairs += [(one.prompt.logprobs, other.prompt.logprobs)] if one.prompt and other.prompt else []
        for found, wanted in pairs:
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_processes_have_their_own_parts_of_weights_that_this_one_has_led(folder_of: Callable[[str], Path]) -> None:
    folder, layout = folder_of("dense"), Layout(tp=2)
    with open_ranks(folder, layout, "cpu", print) as leader:
        mine = leader.checksum()
    assert on_ranks(2, folder, layout, Leader.checksum) == mine == Engine(load_model(folder), SIZES).checksum()


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_same_bits_in_every_batch(folder_of: Callable[[str], Path], kind: str) -> None:
    layout = Layout(tp=4, ep=2 if kind == "experts" else 1)
    tight = SIZES.model_copy(update={"cache_tokens": 96, "max_batch_tokens": 9})  # small chunks, preemption
    one_by_one = [[request] for request in asked()[:6:2] + asked()[4:5]]  # of all rules
    folder = folder_of(kind)
    (whole,) = on_ranks(4, folder, layout, generate, SIZES, asked())
    apart = on_ranks(4, folder, layout, generate, tight, *one_by_one, asked())
    assert [completion for (completion,) in apart[:-1]] == whole[:6:2] + whole[4:5]
    assert apart[-1] == whole


def sums(world: World) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return sums of rows that cancel out in part, as one process adds them up and as others do."""
    parts = [torch.randn(9, 6, generator=torch.Generator().manual_seed(rank)) * 10.0**rank for rank in range(4)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (0, 1, 4, 9):
            of_all = [part[:rows].to(dtype) for part in parts]
            wanted = ((of_all[0].float() + of_all[1]) + of_all[2]) + of_all[3]
            found.append((ordered_sum(of_all[world.rank], dist.group.WORLD), wanted.to(dtype)))
    return found


@pytest.mark.parametrize("spread", [0, 2**20])
def test_sums_are_added_in_the_order_of_ranks(spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SPREAD_BYTES", spread)
    for pairs in run(4, sums):
        assert all(torch.equal(found, wanted) and found.dtype == wanted.dtype for found, wanted in pairs)


def states(leader: Leader, folder: Path) -> tuple[list[Any], list[str]]:
    """Return what comes of the same requests asleep and awake, in parts, with weights and without, and checksums."""
    engine = Engine(leader.model, SIZES, memory=leader)
    found: list[Any] = [engine.generate(asked())]
    sums = [engine.checksum()]
    for drop in (False, True):
        engine.sleep(drop)
        engine.wake()
        if drop:
            engine.update_weights(folder)
        engine.resume()
        found.append(engine.generate(asked()))
    return found, [*sums, engine.checksum()]


def test_sleep_and_checksum_are_those_of_one_process(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("experts")
    (first, asleep, without), sums = on_ranks(2, folder, Layout(tp=2), states, folder)
    assert first == asleep
    assert [x.tokens for x in first] == [x.tokens for x in without]
    assert [x.logprobs for x in first] == [x.logprobs for x in without]
    assert sums == [Engine(load_model(folder), SIZES).checksum()] * 2


def parts(leader: Leader) -> tuple[torch.Tensor, list[str]]:
    """Return hidden states over whole documents, and why the model's parts cannot be called."""
    tokens, (positions, context) = torch.arange(1, 10), packed_context([4, 5])
    calls = [
        lambda: leader.model.embed_tokens(tokens),
        lambda: leader.model.run_layers(torch.zeros(9, 32), positions, context),
        lambda: leader.model.score(torch.zeros(9, 32), tokens),
        lambda: leader.model(tokens, positions, PagedContext(foreign, *[tokens] * 4)),
    ]
    foreign = KeyValueCache(leader.model.config, 4, 4, torch.device("cpu"))
    refusals = []
    for call in calls:
        with pytest.raises(LiaoyuanError) as refused:
            call()
        refusals.append(str(refused.value))
    with torch.inference_mode():
        return leader.model(tokens, positions, context, hidden=True).clone(), refusals


def test_hidden_states_are_whole_and_no_part_of_a_model_waits_for_the_others(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("latent")
    hidden, refusals = on_ranks(2, folder, Layout(tp=2, ep=2), parts)
    positions, context = packed_context([4, 5])
    wanted = load_model(folder)(torch.arange(1, 10), positions, context, hidden=True)
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
    assert ["as a whole" in words for words in refusals] == [True, True, True, False]
    assert "a cache that all of them know" in refusals[3]


def lose_the_last_exchange(leader: Leader) -> tuple[str, str]:
    """Let the leader's connection break in the last exchange of a call, that of logits; return what is said of it."""
    gather = inference.gather_columns

    def lose(x: torch.Tensor, group: Any) -> torch.Tensor:
        gather(x, group)
        raise RuntimeError("Connection reset by peer. GLHF!")

    inference.gather_columns = lose
    try:
        with torch.inference_mode():
            leader.model(torch.arange(1, 6), *packed_context([5]))
        return "nothing", ""
    except LiaoyuanError as error:
        return str(error), leader.failure
    finally:
        inference.gather_columns = gather
        leader.failure = ""  # they still hear each other: let them end


def test_a_connection_that_breaks_in_the_last_exchange_is_a_sentence(folder_of: Callable[[str], Path]) -> None:
    said, failure = on_ranks(2, folder_of("dense"), Layout(tp=2), lose_the_last_exchange)
    assert said.startswith("A process of this model failed, and the others with it: start it again")
    assert failure and "GLHF" not in said


def drop_in_between(leader: Leader) -> tuple[list[Completion], list[Completion]]:
    """Return answers before and after the last reference to a cache goes in the middle of a call."""
    kept = [leader.new_cache(4, 4)]
    hook = leader.model.layers[1].register_forward_pre_hook(lambda *_: kept.clear())
    before, after = (generate(leader, SIZES, asked())[0] for _ in range(2))
    hook.remove()
    return before, after


def test_a_cache_that_goes_in_the_middle_of_a_call_stops_nobody(folder_of: Callable[[str], Path]) -> None:
    before, after = on_ranks(2, folder_of("dense"), Layout(tp=2), drop_in_between)
    assert before == after


def update(leader: Leader, folders: list[Path]) -> list[list[Completion] | str]:
    """Return the answers, or the refusal, after an update by each of the folders."""
    engine, found = Engine(leader.model, SIZES, memory=leader), []
    for folder in folders:
        try:
            engine.update_weights(folder)
            found.append(engine.generate(asked()))
        except LiaoyuanError as error:
            found.append(str(error))
    return found


def test_new_weights_come_to_all_processes_or_to_none(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    first, second, other = folder_of("experts"), folder_of("experts", 1), folder_of("dense")
    torn = Path(shutil.copytree(second, tmp_path / "torn"))
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])  # what the last of the processes alone would read
    layout = Layout(tp=2, ep=2)
    new, refused, foreign, still = on_ranks(2, first, layout, update, [second, torn, other, second])
    assert [x.tokens for x in new] == [x.tokens for x in Engine(load_model(second), SIZES).generate(asked())]
    assert "safetensors" in refused and "another model" in foreign
    assert [(x.tokens, x.logprobs) for x in still] == [(x.tokens, x.logprobs) for x in new]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=3), "does not divide the 4 key-value heads"),
        (Layout(tp=2, ep=4), "ep = 4 does not divide"),
        (Layout(tp=2, fsdp=2), "start more replicas"),
        (Layout(pp=2), "start more replicas"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, words: str) -> None:
    with pytest.raises(LiaoyuanError, match=words):
        check_inference(layout, config_from_dict(MODELS["experts"]))


def test_messages_come_back_as_they_were() -> None:
    tensors = [torch.arange(5000).view(50, 100), None, torch.zeros(0, 3, dtype=torch.int32), torch.tensor([7])]
    message = encode(9, tensors)
    assert len(message) > FIRST
    kind, found = decode(message)
    assert kind == 9 and found[1] is None
    for one, other in zip(tensors, found, strict=True):
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))

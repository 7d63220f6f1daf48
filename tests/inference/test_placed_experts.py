"""Experts that lie several times in a running model and are moved: no answer changes a bit, new weights reach all
copies, only what a process lacks is sent, a move happens everywhere or nowhere, and the work becomes more even.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Completion, Engine
from liaoyuan.inference.expert_placement import count_moves, rank_loads
from liaoyuan.inference.spread import part
from liaoyuan.inference.spread.balance import Balancing
from liaoyuan.inference.spread.mirror import Leader
from liaoyuan.models import Decoder, config_from_dict, with_dtype
from liaoyuan.models.experts import Router
from liaoyuan.ops import checksum
from liaoyuan.parallel import Layout, check_inference, inference
from liaoyuan.parallel.expert_table import (
    Transfer,
    check_placement,
    copied,
    first_placement,
    holders,
    moves,
    slot_table,
)
from liaoyuan.parallel.placed_experts import PlacedExperts, Routes
from tests.conftest import randomised, slow_if
from tests.inference.test_ranks import SIZES, asked, on_ranks
from tests.parallel.layouts import MODELS

EMPTY = -1


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    """A number of experts, and two placements [ranks, slots] of all of them; ranks may name one several times."""
    ranks, share = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    slots, experts = share + draw(st.integers(0, 3)), ranks * share
    found = []
    for _ in range(2):
        named = list(range(experts)) + draw(
            st.lists(st.integers(0, experts - 1), min_size=ranks * slots - experts, max_size=ranks * slots - experts)
        )
        found.append(np.array(draw(st.permutations(named)), dtype=np.int32).reshape(ranks, slots))
    return experts, found[0], found[1]


def contents(placement: np.ndarray, experts: int) -> np.ndarray:
    """Return what is in each slot: its expert, or nothing."""
    found = np.full(placement.shape, EMPTY)
    for expert, places in enumerate(holders(placement, experts)):
        for place in places:
            found[place] = expert
    return found


def carry_out(transfers: list[Transfer], there: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Return what is in the slots of `here` after all transfers out of `there`, which happen at once."""
    after = here.copy()
    for transfer in transfers:
        assert there[transfer.source] == transfer.expert
        after[transfer.target] = transfer.expert
    return after


@given(placements())
def test_moves_bring_every_expert_to_its_slots_and_send_the_fewest(case: tuple[int, np.ndarray, np.ndarray]) -> None:
    experts, before, after = case
    plan = moves(before, after, experts)
    there = contents(before, experts)
    now, wanted = carry_out(plan, there, there), contents(after, experts)
    assert (now[wanted != EMPTY] == wanted[wanted != EMPTY]).all()
    assert sum(move.is_sent for move in plan) == count_moves(before[None], after[None])
    assert moves(before, before, experts) == []


@given(placements())
def test_slots_are_filled_from_other_slots(case: tuple[int, np.ndarray, np.ndarray]) -> None:
    experts, source, target = case
    plan = copied(source, target, experts)
    filled = carry_out(plan, contents(source, experts), np.full(target.shape, EMPTY))
    assert (filled == contents(target, experts)).all()
    assert sum(move.is_sent for move in plan) == count_moves(source[None], target[None])


@given(placements(), st.randoms(use_true_random=False))
def test_rows_go_to_ranks_as_the_placement_counts_on_it(case: tuple[int, np.ndarray, np.ndarray], random: Any) -> None:
    experts, placement, _ = case
    table, counts = slot_table(placement, experts)
    held, slots = contents(placement, experts).flatten(), placement.shape[1]
    load = np.array([float(random.randrange(9)) for _ in range(experts)])
    work = np.zeros(len(placement))
    for expert in range(experts):
        shares = table[expert, : counts[expert]]
        assert (held[table[expert]] == expert).all()
        np.add.at(work, shares // slots, load[expert] / counts[expert])
    if load.sum():
        expected = rank_loads(placement[None], load[None])[0]
        np.testing.assert_allclose(work / work.mean(), expected, atol=1e-12)


def test_at_the_start_each_rank_has_its_share_in_order() -> None:
    assert first_placement(8, 2, 6).tolist() == [[0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5]]
    assert contents(first_placement(4, 2, 4), 4).tolist() == [[0, 1, EMPTY, EMPTY], [2, 3, EMPTY, EMPTY]]


def test_a_placement_without_an_expert_is_refused() -> None:
    with pytest.raises(LiaoyuanError, match="no copy of expert 2 in layer 1"):
        check_placement(np.array([[[0, 1, 2]], [[0, 1, 1]]]), 3)
    with pytest.raises(LiaoyuanError, match="beyond the 3"):
        check_placement(np.array([[[0, 1, 3]]]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_copy_is_its_own_and_copies_share_evenly(dtype: torch.dtype) -> None:
    routes = Routes.of(np.array([[0, 1, 2], [3, 0, 1], [2, 3, 0]]), 4, torch.device("cpu"))
    x = torch.randn(6000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = torch.tensor([[0, 1]]).expand(6000, 2)  # all choose the same
    found = routes.choose(x, chosen)
    order = torch.randperm(6000)
    assert torch.equal(routes.choose(x[order], chosen)[order.argsort()], found)
    assert torch.equal(torch.cat([routes.choose(x[n : n + 1], chosen[:1]) for n in range(50)]), found[:50])
    shares = torch.stack([torch.bincount(column, minlength=9) for column in found.T])
    for row, slots in zip(shares, ([0, 4, 8], [1, 5]), strict=True):
        assert row.sum() == row[slots].sum()
        assert (row[slots] * len(slots) / 6000 - 1).abs().max() < 0.06


def skewed(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a model whose routers choose the first experts, which are all in the first process, far more often."""
    model = randomised(config_from_dict(MODELS[kind]), seed)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        with torch.no_grad():
            router.weight[:4] = router.weight[:2].repeat(2, 1) * torch.tensor([[4.0], [4.0], [-4.0], [-4.0]])
    config = with_dtype(model.config, dtype)
    other = Decoder(config).to(dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def folder(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
        made: Path = tmp_path_factory.mktemp(kind)
        save_model(skewed(kind, seed, dtype), made / "model")
        return made / "model"

    return folder


def some_placement(placed: PlacedExperts, random: np.random.Generator) -> np.ndarray:
    """Return a placement of all experts by chance."""
    layers = []
    for layer in placed.placement:
        more = random.integers(placed.experts, size=layer.size - placed.experts)
        layers.append(random.permutation(np.concatenate([np.arange(placed.experts), more])).reshape(layer.shape))
    return np.stack(layers).astype(np.int32)


def placed_of(leader: Leader) -> PlacedExperts:
    found = leader.placed
    assert found is not None
    return found


def weights_of(engine: Engine) -> tuple[str, list[str]]:
    """Return the checksum of the weights, and that of each tensor, in the order of their names."""
    each: list[str] = []

    def note(tensor: torch.Tensor, before: int) -> int:
        each.append(f"{checksum(tensor):016x}")
        return checksum(tensor, before=before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "checksum", note)
        return engine.checksum(), each


def generate_and_move(
    leader: Leader, every: int
) -> tuple[list[Any], list[Any], list[int], tuple[str, list[str]], tuple[str, list[str]]]:
    """Return the answers while experts stay, and while they move after every so many steps; how many more were sent
    than had to be; and `weights_of` before and then. What experts are asked for must be counted alike.
    """
    engine, random, counts = Engine(leader.model, SIZES, memory=leader), np.random.default_rng(1), []
    placed, step, loaded = placed_of(leader), engine._step.advance, weights_of(engine)
    still, loads = engine.generate(asked()), placed.loads()
    placed.forget_loads()

    def advance(plan: Any) -> Any:
        if engine._step.steps % every == 0:
            placement = some_placement(placed, random)
            counts.append(leader.move_experts(placement) - count_moves(placed_before.pop(), placement))
            placed_before.append(placement)
        return step(plan)

    placed_before = [placed.placement]
    engine._step.advance = advance  # type: ignore[method-assign]
    moved = engine.generate(asked())
    assert (placed.loads() == loads).all() and loads.sum()
    return still, moved, counts, loaded, weights_of(engine)


WAYS = [
    ("experts", 2, Layout(tp=2, ep=2), 0, torch.float32),
    ("experts", 2, Layout(tp=2, ep=2), 2, torch.bfloat16),
    ("latent", 4, Layout(tp=4, ep=4), 3, torch.float32),
    ("sinks", 4, Layout(tp=4, ep=2), 4, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("kind", "size", "layout", "copies", "dtype"),
    [slow_if(way[3] != 3, *way, name=f"{way[0]}-{way[3]}") for way in WAYS],
)
def test_no_answer_changes_a_bit_while_experts_move(
    folder_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    size: int,
    layout: Layout,
    copies: int,
    dtype: torch.dtype,
) -> None:
    folder = folder_of(kind, dtype=dtype)
    plain, *_ = on_ranks(size, folder, layout, generate_and_move, 10**6)
    monkeypatch.setattr(inference, "SPREAD_BYTES", 2050)  # so that long steps are added up at their owners, others not
    still, moved, counts, loaded, left = on_ranks(
        size, folder, layout, generate_and_move, 2, balancing=Balancing(copies)
    )
    assert plain == still == moved
    assert len(counts) > 5 and not any(counts)
    model = load_model(folder)
    wanted = [f"{checksum(tensor):016x}" for _, tensor in sorted(model.state_dict().items())]
    assert loaded == left == (Engine(model, SIZES).checksum(), wanted)


def one_by_one(leader: Leader) -> tuple[list[Completion], list[Completion]]:
    engine = Engine(leader.model, SIZES, memory=leader)
    leader.move_experts(some_placement(placed_of(leader), np.random.default_rng(2)))
    together = engine.generate(asked())
    return together, [engine.generate([request])[0] for request in asked()]


def test_copies_give_the_same_bits_in_every_batch(folder_of: Callable[..., Path]) -> None:
    together, apart = on_ranks(
        2, folder_of("experts", dtype=torch.bfloat16), Layout(tp=2, ep=2), one_by_one, balancing=Balancing(3)
    )
    assert together == apart


def update_and_sleep(leader: Leader, folder: Path) -> tuple[list[list[Completion]], list[str]]:
    """Return answers and checksums after new weights, and after a sleep without weights, with moves before each."""
    engine, random = Engine(leader.model, SIZES, memory=leader), np.random.default_rng(3)
    answers, sums = [], []
    for sleeps in (False, True):
        leader.move_experts(some_placement(placed_of(leader), random))
        if sleeps:
            engine.sleep(without_weights=True)
            with pytest.raises(LiaoyuanError, match="no experts here"):
                leader.move_experts(placed_of(leader).placement)
            engine.wake()
        engine.update_weights(folder)
        engine.resume()
        for _ in range(2):
            answers.append(engine.generate(asked()))
            sums.append(engine.checksum())
            leader.move_experts(some_placement(placed_of(leader), random))
    return answers, sums


def test_new_weights_reach_every_copy(folder_of: Callable[..., Path]) -> None:
    old, new = folder_of("experts"), folder_of("experts", 1)
    layout = Layout(tp=2, ep=2)
    wanted, *_ = on_ranks(2, new, layout, generate_and_move, 10**6)
    answers, sums = on_ranks(2, old, layout, update_and_sleep, new, balancing=Balancing(2))
    bits = [(completion.tokens, completion.logprobs) for completion in wanted]
    assert all([(x.tokens, x.logprobs) for x in answer] == bits for answer in answers)
    assert sums == [Engine(load_model(new), SIZES).checksum()] * 4


def refused_moves(leader: Leader) -> tuple[list[Completion], list[Completion], list[str], bool]:
    engine, placed = Engine(leader.model, SIZES, memory=leader), placed_of(leader)
    before, placement = engine.generate(asked()), placed.placement.copy()
    refusals = []
    for wrong in (placement[:, ::-1], np.zeros_like(placement), placement[:, :1]):
        with pytest.raises(LiaoyuanError) as refused:
            leader.move_experts(wrong)
        refusals.append(str(refused.value))
    return before, engine.generate(asked()), refusals, bool((placed.placement == placement).all())


def test_a_move_that_one_process_cannot_make_is_made_nowhere(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = PlacedExperts._stage
    monkeypatch.setattr(PlacedExperts, "_stage", lambda self, plans: None if self.place == 1 else stage(self, plans))
    before, after, refusals, stays = on_ranks(
        2, folder_of("experts"), Layout(tp=2, ep=2), refused_moves, balancing=Balancing(2)
    )
    assert before == after and stays
    for words, said in zip(["no memory", "no copy of expert 1", "A placement of this model"], refusals, strict=True):
        assert words in said


def watched(leader: Leader) -> tuple[list[list[Completion]], list[dict[str, Any]], list[float]]:
    """Return answers again and again, what the statistics say after each, and the imbalance of each."""
    engine, placed = Engine(leader.model, SIZES, memory=leader), placed_of(leader)
    answers, said, measured = [], [], []
    for _ in range(8):
        busiest, total = placed.busiest.copy(), placed.total.copy()
        answers.append(engine.generate(asked()))
        measured.append(float((placed.ranks * (placed.busiest - busiest) / (placed.total - total)).mean()))
        said.append({key: value for key, value in engine.statistics().items() if "expert" in key})
    return answers, said, measured


@pytest.mark.parametrize("copies", [slow_if(True, 0), 2])
def test_work_becomes_even_and_answers_stay(folder_of: Callable[..., Path], copies: int) -> None:
    folder, layout = folder_of("experts"), Layout(tp=2, ep=2)
    wanted, quiet, uneven = on_ranks(2, folder, layout, watched, balancing=Balancing(copies))
    answers, said, measured = on_ranks(2, folder, layout, watched, balancing=Balancing(copies, 0.0))
    assert answers == wanted
    assert uneven == [uneven[0]] * 8 and uneven[0] > 1.5 and measured[-1] < 1.2
    assert quiet[-1]["expert_looks"] == quiet[-1]["expert_moves"] == 0
    assert quiet[-1]["expert_imbalance"] == pytest.approx(uneven[0], rel=0.1)
    assert said[-1]["expert_imbalance"] < 1.25 and said[-1]["expert_refusals"] == 0
    assert said[-1]["expert_looks"] > 1 and said[-1]["expert_moves"] > 1


@pytest.mark.parametrize(
    ("kind", "layout", "copies", "words"),
    [
        ("dense", Layout(tp=2), 1, "a model that has none"),
        ("experts", Layout(tp=2), 1, "give --ep too"),
        ("experts", Layout(tp=2, ep=2), 5, "5 copies are more than the 4 experts"),
    ],
)
def test_copies_that_do_not_fit_are_refused(kind: str, layout: Layout, copies: int, words: str) -> None:
    with pytest.raises(LiaoyuanError, match=words):
        check_inference(layout, config_from_dict(MODELS[kind]), expert_copies=copies)


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Engine
from liaoyuan.inference.spread.balance import Balancing
from liaoyuan.inference.spread.ranks import open_ranks
from liaoyuan.parallel import Layout
from liaoyuan.parallel.parcels import Exchange

told, said = threading.Event(), []
def failed(why):
    said.append(why)
    told.set()
children = lambda: [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
with open_ranks(Path(sys.argv[1]), Layout(tp=2, ep=2), "cpu", failed, balancing=Balancing(2)) as leader:
    engine = Engine(leader.model, memory=leader)
    run = Exchange.run
    def kill_and_run(self):
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        run(self)
    Exchange.run = kill_and_run
    placement = leader.placed.placement
    try:
        leader.move_experts(placement[:, ::-1])
    except LiaoyuanError as error:
        print("refused:", error)
    assert (leader.placed.placement == placement).all() and told.wait(20)
print(said[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks up processes in /proc")
def test_a_process_killed_during_a_move_ends_all(folder_of: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", KILLED, str(folder_of("experts"))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "refused: A process of this model failed, and the others with it" in found.stdout, found.stderr
    assert "Process 1 of 2 of the model was killed by SIGKILL" in found.stdout

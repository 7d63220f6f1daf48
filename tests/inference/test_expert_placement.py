"""Promises of expert placement: everything is placed, never less even than before, no move without its price, and
beside the best of all placements where all can be tried.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.expert_placement import (
    LoadAverage,
    apply,
    count_moves,
    imbalance,
    lots,
    move_price,
    place,
    rank_loads,
    rebalance,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Loads [domains, layers, experts] with zeros and ties, ranks and slots that hold all of them."""
    experts, ranks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    slots = draw(st.integers(-(-experts // ranks), experts))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), experts)
    numbers = draw(st.lists(st.integers(0, 50), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(numbers, dtype=float).reshape(shape), ranks, slots


def is_whole(placement: np.ndarray, experts: int) -> bool:
    """Every slot holds an expert, no rank one twice, every expert is somewhere."""
    distinct = all(len(set(rank.tolist())) == len(rank) for layer in placement for rank in layer)
    return distinct and all(set(layer.flatten().tolist()) == set(range(experts)) for layer in placement)


def every_placement(experts: int, ranks: int, slots: int) -> np.ndarray:
    """All whole placements of one layer, [P, ranks, slots], ranks told apart."""
    rows = itertools.product(itertools.combinations(range(experts), slots), repeat=ranks)
    return np.array([row for row in rows if len(set(itertools.chain(*row))) == experts])


@given(cases())
def test_all_experts_are_placed_and_all_slots_are_full(case: tuple[np.ndarray, int, int]) -> None:
    load, ranks, slots = case
    placement = place(load, ranks, slots)
    assert placement.shape == (load.shape[1], ranks, slots)
    assert is_whole(placement, load.shape[-1])


@given(cases(), st.floats(0, 0.2), st.randoms(use_true_random=False))
def test_steps_pay_for_themselves_and_no_domain_gets_worse(
    case: tuple[np.ndarray, int, int], price: float, random: object
) -> None:
    load, ranks, slots = case
    before = place(np.roll(load, 1, axis=-1), ranks, slots)
    steps = rebalance(before, load, price)
    after = apply(before, steps)
    gained = imbalance(before, load).max(0) - imbalance(after, load).max(0)
    for layer in range(len(before)):
        own = [step for step in steps if step.layer == layer]
        moves = sum(len(step.moves) for step in own)
        assert gained[layer] == pytest.approx(sum(step.gain for step in own), abs=1e-9)
        assert gained[layer] >= price * moves and (gained[layer] > 0 or not own)
        assert count_moves(before[layer : layer + 1], after[layer : layer + 1]) <= moves


@given(cases(), st.integers(1, 5))
def test_one_may_stop_after_any_lot(case: tuple[np.ndarray, int, int], size: int) -> None:
    load, ranks, slots = case
    placement = place(np.roll(load, 1, axis=-1), ranks, slots)
    steps, sent = rebalance(placement, load, 0.0), []
    end = apply(placement, steps)
    for lot in lots(steps, size):
        assert sum(len(step.moves) for step in lot) <= max(size, 2)
        now = apply(placement, lot)
        assert is_whole(now, load.shape[-1])
        assert (imbalance(now, load).max(0) <= imbalance(placement, load).max(0) + 1e-9).all()
        placement, sent = now, sent + lot
    assert sorted(map(repr, sent)) == sorted(map(repr, steps))
    assert (placement == end).all()


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(4, 2, 3), (5, 3, 2), (6, 2, 4), (6, 3, 3), (6, 3, 2)])
def test_near_the_best_of_all_placements(experts: int, ranks: int, slots: int) -> None:
    every = every_placement(experts, ranks, slots)
    random = np.random.default_rng(experts)
    found, best = [], []
    for _ in range(20):
        load = random.exponential(size=experts) ** 2
        found.append(imbalance(place(load[None], ranks, slots), load[None])[0])
        best.append(imbalance(every, np.broadcast_to(load, (len(every), experts))).min())
    ratio = np.array(found) / np.array(best)
    assert ratio.min() >= 1 - 1e-9  # the oracle is one
    assert ratio.mean() < 1.03 and ratio.max() < 1.2


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(5, 3, 2), (6, 2, 4), (6, 3, 3)])
def test_near_the_least_sum_of_imbalance_and_price(experts: int, ranks: int, slots: int) -> None:
    """Against every placement, each with the fewest moves that lead to it."""
    every, price = every_placement(experts, ranks, slots), 0.03
    random = np.random.default_rng(experts)
    found, best = [], []
    for _ in range(20):
        load = random.exponential(size=(2, 1, experts)) ** 2
        before = place(load[0], ranks, slots)
        after = apply(before, rebalance(before, load[1], price))
        cost = [imbalance(layer[None], load[1])[0] + price * count_moves(before, layer[None]) for layer in every]
        best.append(min(cost))
        found.append(imbalance(after, load[1])[0] + price * count_moves(before, after))
    ratio = np.array(found) / np.array(best)
    assert ratio.min() >= 1 - 1e-9
    assert ratio.mean() < 1.03 and ratio.max() < 1.25


def test_a_busy_expert_is_copied_rather_than_moved() -> None:
    placement = np.array([[[0, 1, 2], [3, 2, 1]]])
    load = np.array([[8.0, 1.0, 1.0, 1.0]])
    (step,) = rebalance(placement, load, 0.1)
    assert [(move.rank, move.expert) for move in step.moves] == [(1, 0)]
    assert rank_loads(placement, load).tolist() == [[pytest.approx(9 / 5.5), pytest.approx(2 / 5.5)]]
    assert rank_loads(apply(placement, [step]), load).tolist() == [[1.0, 1.0]]


def test_nothing_is_moved_where_the_gain_does_not_pay() -> None:
    load = np.random.default_rng(0).exponential(size=(1, 32))
    before = place(np.ones((1, 32)), 4, 10)
    assert rebalance(before, load, 10.0) == []
    assert [len(rebalance(before, load, price)) for price in (0.0, 0.01, 0.1)] == sorted(
        [len(rebalance(before, load, price)) for price in (0.0, 0.01, 0.1)], reverse=True
    )
    assert move_price(expert_bytes=44e6, bytes_per_second=40e9, layer_seconds=1e-3, steps=1000) == pytest.approx(1.1e-3)


def test_a_placement_for_two_domains_is_even_in_both() -> None:
    random = np.random.default_rng(1)
    load = random.exponential(size=(2, 3, 32))
    both, first = place(load, 4, 10), place(load[0], 4, 10)
    assert imbalance(both, load).max() < 1.1
    assert imbalance(first, load)[1].max() > 1.15


def test_groups_stay_on_their_node() -> None:
    load = np.random.default_rng(2).exponential(size=(2, 32))
    placement = place(load, 8, 6, nodes=2, groups=8)
    later = apply(placement, rebalance(placement, load[::-1], 0.0, nodes=2))
    for layer in (*placement, *later):
        groups = [{int(expert) // 4 for expert in node.flatten()} for node in np.split(layer, 2)]
        assert len(groups[0]) == len(groups[1]) == 4 and not groups[0] & groups[1]
    assert is_whole(placement, 32) and is_whole(later, 32)
    assert (imbalance(later, load[::-1]) < imbalance(placement, load[::-1])).all()


def test_a_placement_from_elsewhere_may_have_two_copies_on_one_rank() -> None:
    placement, load = np.array([[[0, 0, 1], [2, 3, 1]]]), np.array([[9.0, 1.0, 1.0, 1.0]])
    after = apply(placement, rebalance(placement, load, 0.0))
    assert imbalance(after, load)[0] == pytest.approx(1.0)
    assert sorted(set(after.flatten().tolist())) == [0, 1, 2, 3]


def test_moves_are_what_a_rank_has_not() -> None:
    before = np.array([[[0, 1], [2, 3]]])
    assert count_moves(before, np.array([[[1, 0], [3, 2]]])) == 0
    assert count_moves(before, np.array([[[0, 2], [1, 3]]])) == 2
    assert count_moves(before, before) == 0


@settings(max_examples=20)
@given(st.floats(1, 100))
def test_an_average_follows_its_half_life(half_life: float) -> None:
    average = LoadAverage(half_life)
    average.add(np.array([[1.0, 0.0]]), "code")
    average.add(np.array([[3.0, 3.0]]), "maths")
    assert average.load().tolist() == [[[1.0, 0.0]], [[0.5, 0.5]]]
    for _ in range(200):
        average.add(np.array([[0.0, 2.0]]), "code")
    assert average.load()[0, 0, 0] < 0.5 ** (200 / half_life) / (1 - 0.5 ** (200 / half_life))


def test_several_averages_see_what_is_new_and_what_lasts() -> None:
    average = LoadAverage(1, 100)
    for counts in [[0.0, 4.0]] * 50 + [[4.0, 0.0]] * 2:
        average.add(np.array([counts]))
    new, lasting = average.load()[:, 0, 0]
    assert new == pytest.approx(0.75) and lasting < 0.1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LiaoyuanError, match="8 experts need 8 slots"):
        place(np.ones((1, 8)), 2, 3)
    with pytest.raises(LiaoyuanError, match="9 slots a rank are more than the 8 experts"):
        place(np.ones((1, 8)), 2, 9)
    with pytest.raises(LiaoyuanError, match="3 nodes must divide"):
        place(np.ones((1, 8)), 4, 4, nodes=3, groups=8)
    with pytest.raises(LiaoyuanError, match="no copy of expert 2 in layer 0"):
        rebalance(np.array([[[0, 0], [1, 3]]]), np.ones((1, 4)), 0.0)

"""Plans of reinforcement learning: what phases add up to, which split wins, and that no card helps less than none."""

from dataclasses import replace
from typing import Any

import pytest

from liaoyuan.compute.plan import Cluster, Job, dry_run, read_cluster
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.program.apart import apart
from liaoyuan.compute.plan.serving import EngineRates, Machines, Served
from liaoyuan.compute.plan.tuning import RlJob, RlPlanner, Split, Update, UpdatePrice, priced, splits
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.recipe import ReinforceConfig
from tests.compute.plan.serving.models import big


def machines(cluster: Cluster | None = None) -> Machines:
    cluster = cluster or read_cluster("h100")
    return Machines(cluster, assumed(cluster), EngineRates())


def smaller() -> ModelConfig:
    return replace(big(), num_hidden_layers=8, vocab_size=32000)


def job(spread: float = 0.5, answer: float = 60, **settings: Any) -> RlJob:
    rl = ReinforceConfig.model_validate({"problems": 16, "group": 8, "max_tokens": 256, "steps": 100} | settings)
    return RlJob(smaller(), rl, 50, answer, spread)


def planned(one: RlJob, split: Split, **options: Any) -> Any:
    return RlPlanner(one, machines()).plan(split, **options)


def test_shared_cards_take_turns_and_split_ones_do_not() -> None:
    shared, split = planned(job(), Split(4)), planned(job(), Split(4, 2))
    one = shared.phases
    assert one.step == pytest.approx(one.rollout + one.scoring + one.training + one.synchronising)
    two = split.phases
    assert two.step == pytest.approx(max(two.rollout, two.scoring + two.training) + two.synchronising)
    assert two.idle == pytest.approx(abs(two.rollout - two.scoring - two.training))
    assert shared.hours.median == pytest.approx(100 * one.step / 3600)
    assert shared.seconds.low < shared.seconds.median < shared.seconds.high


def test_one_card_has_nothing_to_send() -> None:
    assert planned(job(), Split(1)).phases.synchronising == 0.0


def test_a_batch_ends_with_its_longest_answer() -> None:
    """With as many slots as answers, each step adds a token to all: as many steps as the longest answer has tokens."""
    even, tailed = job(0.0), job(1.2)
    longest = max(tailed.lengths)
    assert longest > 3 * max(even.lengths)
    slow, fast = (planned(one, Split(1), interval=False).phases.rollout for one in (tailed, even))
    assert longest / max(even.lengths) * 0.7 < slow / fast < longest / max(even.lengths) * 1.1


def test_each_kind_of_scoring_costs_what_it_reads() -> None:
    base = job(measure_kl=False)
    update = base.update
    price = UpdatePrice(base.model, machines().cluster, machines().certain.profile)
    found = {
        name: planned(one, Split(1), interval=False).phases.scoring
        for name, one in {
            "none": base,
            "weights": replace(base, corrected=True),
            "teacher": replace(base, teacher=base.model),
            "judge": replace(base, judge=base.model),
        }.items()
    }
    assert found["none"] == 0.0
    assert found["weights"] == found["teacher"] == pytest.approx(price.forward(update))
    assert found["judge"] > found["teacher"]  # which reads all answers, and not those alone that are learned


def test_an_update_costs_three_passes_and_the_optimiser() -> None:
    price = UpdatePrice(smaller(), machines().cluster, machines().certain.profile)
    update = Update(8192, 500, 4096)
    assert price.learn(update) == pytest.approx(3 * price.forward(update) + price.optimise())
    served = Served(smaller())
    products = 8192 * (served.model.flops_per_token(500) - 2 * served.model.vocab_size * served.model.hidden_size)
    least = (products + 4096 * 2 * served.model.vocab_size * served.model.hidden_size) / 989.4e12
    assert least < price.forward(update) < 4 * least


def test_more_cards_or_bandwidth_are_never_slower() -> None:
    fast = machines().cluster
    slow = fast.model_copy(
        update={"links": tuple(one.model_copy(update={"bandwidth_gb": one.bandwidth_gb / 8}) for one in fast.links)}
    )
    steps = [
        min(
            one.phases.step
            for one in (RlPlanner(job(), machines(on)).plan(split, False) for split in splits(smaller(), cards))
            if one.phases
        )
        for on, cards in ((fast, 4), (slow, 4), (fast, 2))
    ]
    assert steps[0] <= steps[1] and steps[0] <= steps[2]


def test_what_does_not_fit_says_why() -> None:
    found = RlPlanner(replace(job(), model=big()), machines()).plan(Split(1))
    assert found.phases is None and "training takes" in found.why_not


def test_the_search_ranks_all_ways() -> None:
    found = RlPlanner(job(), machines()).search(2)
    assert {one.split for one in found} == set(splits(smaller(), 2))
    steps = [one.phases.step for one in found if one.phases]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("cards", "microbatches"), [(1, 2), (8, 1)])
def test_the_closed_form_is_near_a_dry_run_of_the_program(cards: int, microbatches: int) -> None:
    changes = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4}
    model = replace(big(), num_hidden_layers=2, vocab_size=16000, **changes)
    tokens = 4096 * cards * microbatches
    train = TrainConfig(steps=2, batch_tokens=tokens, microbatches=microbatches)
    on = machines().certain
    planned = Job(model, Layout(), cards, 2048, train, "cuda")
    dry = priced(apart(dry_run, planned), planned, on.cluster, on.profile)
    closed = UpdatePrice(model, on.cluster, on.profile).learn(Update(tokens, 1024, tokens), cards)
    assert closed == pytest.approx(dry.median, rel=0.15)


def test_seconds_of_training_may_come_from_elsewhere() -> None:
    found = RlPlanner(job(), machines(), training=lambda update, cards: 7.0 / cards).plan(Split(2))
    assert found.phases and found.phases.training == pytest.approx(3.5)
    assert found.seconds and found.seconds.low < found.seconds.high

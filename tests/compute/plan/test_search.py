"""The search finds what trying everything would find, proposes only what is legal, and says why not the neighbours."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan import Cluster, Job, read_cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.search.bounds import memory
from liaoyuan.compute.plan.search.estimate import Estimator
from liaoyuan.compute.plan.search.reasons import reasons
from liaoyuan.compute.plan.search.reckoned import Reckoned, by_formulas
from liaoyuan.compute.plan.search.search import Ranking, search
from liaoyuan.compute.plan.search.space import Kept, candidates, describe
from liaoyuan.compute.plan.span import Span
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, resolve
from liaoyuan.training.loop import TrainConfig
from tests.parallel.layouts import MODELS

H100 = read_cluster("h100")
REACHES = (8,)
LARGER = {
    "dense": {"hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128, "num_attention_heads": 16},
    "experts": {"hidden_size": 1024, "moe_intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 16},
}


def job_of(kind: str = "dense", processes: int = 8, rows: int = 16, length: int = 4096, layers: int = 8) -> Job:
    values = MODELS[kind] | LARGER[kind] | {"torch_dtype": "bfloat16", "vocab_size": 4096, "num_hidden_layers": layers}
    train = TrainConfig(steps=1, batch_tokens=rows * length)
    return Job(config_from_dict(values), Layout(), processes, length, train, "cuda")


def cluster_with(gib: float = 79.6, faster: float = 1.0) -> Cluster:
    links = tuple(link.model_copy(update={"bandwidth_gb": link.bandwidth_gb * faster}) for link in H100.links)
    card = H100.accelerator.model_copy(update={"memory_gib": gib})
    return H100.model_copy(update={"links": links, "accelerator": card})


def found(job: Job, cluster: Cluster = H100, kept: Kept | None = None, whole: int = 0) -> Ranking:
    reckon = by_formulas(cluster, assumed(cluster)) if whole else None
    return search(job, cluster, assumed(cluster), reckon, kept, whole, workers=0)


jobs = st.builds(
    job_of,
    kind=st.sampled_from(["dense", "experts"]),
    processes=st.sampled_from([2, 4, 6]),
    rows=st.sampled_from([6, 8, 12]),
    length=st.sampled_from([1024, 2048]),
    layers=st.sampled_from([4, 6]),
)


def another_truth(job: Job, cluster: Cluster, seed: int) -> Callable[[Job], Reckoned]:
    """A prediction as far from the formulas as they claim at most: never below the floor, memory within its margin."""
    figures = assumed(cluster).median()
    estimator = Estimator(Fabric(cluster, figures), figures)

    def reckon(one: Job) -> Reckoned:
        chance = random.Random(f"{seed} {describe(one)}")
        estimate = estimator.of(one)
        seconds = max(estimate.floor, estimate.seconds * math.exp(chance.uniform(-0.7, 0.7)))
        held = memory(one).peak * chance.uniform(0.85, 1.2)
        room = cluster.accelerator.usable_bytes
        return Reckoned(Span(seconds, seconds, seconds), held, room, estimate.computing, estimate.exposed)

    return reckon


@settings(max_examples=5, deadline=None, derandomize=True)
@given(job=jobs, gib=st.sampled_from([4.0, 8.0, 79.6]), seed=st.integers(0, 99))
def test_the_best_is_that_of_all_whatever_predicts_them(job: Job, gib: float, seed: int) -> None:
    cluster = cluster_with(gib)
    truth = another_truth(job, cluster, seed)
    all_of_them = [truth(one) for one in candidates(job, None, REACHES)]
    fitting = [one.seconds.median for one in all_of_them if one.fits]
    if not fitting:
        with pytest.raises(LiaoyuanError, match="fit"):
            search(job, cluster, assumed(cluster), truth, None, None, workers=0)
        return
    ranking = search(job, cluster, assumed(cluster), truth, None, None, workers=0)
    assert ranking.best.seconds == pytest.approx(min(fitting), rel=1e-3)
    assert ranking.legal == len(all_of_them)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(job=jobs)
def test_all_that_is_proposed_is_legal_and_once(job: Job) -> None:
    seen = set()
    for one in candidates(job, None, REACHES):
        assert resolve(one.layout, one.processes, one.shape) == one.layout
        seen.add((describe(one), str(one.layout)))
        assert one.layout.schedule != "gpipe"
    assert len(seen) == sum(1 for _ in candidates(job, None, REACHES))


@pytest.mark.parametrize("pp", [3, 5, 8])
def test_no_estimate_is_below_what_a_step_takes_at_least(pp: int) -> None:
    kept = Kept.of({"pp": pp, "recompute": "none"})
    choices = found(job_of(processes=2 * pp, rows=32, layers=13), kept=kept).choices
    assert choices and all(choice.estimate.floor <= choice.estimate.seconds * (1 + 1e-9) for choice in choices)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(job=jobs)
def test_twice_the_bandwidth_never_hurts(job: Job) -> None:
    assert found(job, cluster_with(faster=2.0)).best.seconds <= found(job).best.seconds * (1 + 1e-9)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(job=jobs)
def test_more_cards_are_slower_only_by_waiting_that_has_a_name(job: Job) -> None:
    few, many = found(job).best, found(replace(job, processes=2 * job.processes)).best
    waiting = sum(many.estimate.exposed.values()) - sum(few.estimate.exposed.values())
    assert many.estimate.computing <= few.estimate.computing * 1.05 or many.seconds <= few.seconds
    assert many.estimate.seconds - few.estimate.seconds <= max(0.0, waiting) + 0.05 * few.estimate.computing


def test_the_order_is_total_and_axes_that_bring_nothing_come_last() -> None:
    ranking = found(job_of(processes=4), whole=2)
    orders = [choice.order for choice in ranking.choices]
    assert orders == sorted(orders) and len(set(orders)) == len(orders)
    estimates = [choice.seconds for choice in ranking.choices[ranking.whole :]]
    assert all(a <= b * 1.001 for a, b in itertools.pairwise(estimates))


def test_what_is_kept_stays_and_unknown_axes_are_named() -> None:
    ranking = found(job_of(), kept=Kept.of({"tp": 2, "microbatches": 2}))
    assert {(choice.job.layout.tp, choice.job.train.microbatches) for choice in ranking.choices} == {(2, 2)}
    with pytest.raises(LiaoyuanError, match="did you mean 'tp'"):
        Kept.of({"tq": 2})


def test_neighbours_are_too_large_or_slower_for_a_reason() -> None:
    cluster = cluster_with(8.0)
    ranking = found(job_of(rows=64, layers=24), cluster, Kept.of({"ulysses": 1, "ring": 1}), 2)
    told = reasons(ranking, assumed(cluster))
    best = describe(ranking.best.job)
    assert {one.axis for one in told} >= {"recompute", "microbatches"}
    assert all(one.neighbour != best for one in told)
    large = [one.sentence for one in told if one.slower is None]
    assert large and all("does not fit: it holds about" in one and "GiB" in one for one in large)
    slower = [one.sentence for one in told if one.slower and one.slower > 0.01]
    assert slower and all("% slower: " in one and "instead of" in one for one in slower)


def test_what_cannot_be_is_told_with_what_would_help() -> None:
    with pytest.raises(LiaoyuanError, match=r"No layout fits on 8 x .* weights and moments"):
        found(job_of(layers=32), cluster_with(2.6))
    with pytest.raises(LiaoyuanError, match="No layout of this job is legal on 7 processes with tp = 2"):
        found(job_of(processes=7), kept=Kept.of({"tp": 2}))


def test_a_prediction_that_fails_is_told_and_the_others_go_on() -> None:
    def reckon(job: Job) -> Reckoned:
        if job.layout.tp == 1:
            raise LiaoyuanError("this one is not liked")
        return by_formulas(H100, assumed(H100))(job)

    kept = Kept.of({"microbatches": 1, "recompute": "none", "pp": 1, "ulysses": 1, "ring": 1})
    ranking = search(job_of(), H100, assumed(H100), reckon, kept, None, workers=2)
    assert ranking.whole and all(choice.job.layout.tp > 1 for choice in ranking.choices[: ranking.whole])
    assert all(why == "this one is not liked" for _, why in ranking.refused)

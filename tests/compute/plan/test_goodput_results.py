"""Beliefs about a cluster become costs, results and choices; what is wrong is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from liaoyuan.checkpoint.tensors import local_tensors
from liaoyuan.cli.main import app
from liaoyuan.compute.plan import Cluster, read_cluster
from liaoyuan.compute.plan.goodput import Run, best_every, best_spares, expected_time, goodput, with_choice
from liaoyuan.compute.plan.goodput.estimate import costs_of
from liaoyuan.compute.plan.goodput.state import state_bytes
from liaoyuan.compute.plan.machine.recovery import Failures, Kind, Recovery
from liaoyuan.compute.plan.span import Span, exactly
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig
from liaoyuan.training.loop import TrainConfig, make_optimiser

RUN = Run(steps=20_000, step=exactly(10), processes=1024, state_bytes=1e12, every=100)


def cluster(**recovery: object) -> Cluster:
    return read_cluster("h100").model_copy(update={"recovery": Recovery.model_validate(recovery)})


KNOWN = cluster(
    kinds=[{"name": "process", "share": 1, "detect": 30}],
    start=270,
    stall=20,
    copy_gb=1e9,
    storage_share=1,
    slow_while_saving=1,
    slow_share=0,
).model_copy(update={"failures": Failures(median=200, low=200, high=200)})


def test_a_belief_has_its_median_and_its_range() -> None:
    belief = Span(2, 3.5, 15)
    normal = np.random.default_rng(0).standard_normal(200_000)
    assert np.quantile(belief.at(normal), [0.05, 0.5, 0.95]) == pytest.approx([2, 3.5, 15], rel=0.02)
    assert (exactly(4).at(normal) == 4).all() and (exactly(0).at(normal) == 0).all()


@pytest.mark.parametrize("wrong", [[3, 2, 1], [1, 2], -1, [0, 1, 2], {"median": 1}, "ten"])
def test_what_is_no_range_is_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        Recovery.model_validate({"swap": wrong})


def test_with_all_known_the_best_interval_is_as_good_as_the_formulas() -> None:
    """One that the search may choose for its own chance: within 0.5% of the time of the best that the formula has."""
    costs = costs_of(RUN, KNOWN, 1)
    save, mean, load = costs.block[0], costs.mean[0], costs.load[0]
    found = best_every(RUN, KNOWN)

    def time(every: int) -> float:
        return expected_time(1, every * 10, save, 300 + load, mean)

    assert found.formula
    assert time(found.best.value) <= 1.005 * min(time(every) for every in range(1, 400))
    assert found.as_good[0] <= found.best.value <= found.as_good[1]
    errors = [abs(one.longer - time(one.value)) / one.error for one in found.tried if one.longer < 1.5]
    assert len(errors) > 6 and max(errors) < 4


def test_a_short_job_is_not_told_to_save_all_the_time_for_the_few_lives_that_fail() -> None:
    short = Run(steps=100, step=Span(9.5, 10, 11), processes=10_240, state_bytes=5.3e12, every=100)
    found = best_every(short, read_cluster("h100"))
    now = next(choice for choice in found.tried if choice.value == short.every)
    assert found.best.price <= now.price and found.best.ettr > now.ettr - 0.05
    assert not math.isinf(now.price) and now.longer < 3


def test_spares_are_bought_where_waiting_is_dearer() -> None:
    lost = [{"name": "node", "share": 1, "detect": 30, "loses_node": True}]
    patient = best_spares(RUN, cluster(kinds=lost, requeue=1)).best.value
    hurried = best_spares(RUN, cluster(kinds=lost, requeue=20_000)).best.value
    assert patient == 0 < hurried
    run, machines = with_choice(RUN, cluster(kinds=lost, requeue=20_000), every=50, spares=hurried)
    assert run.every == 50 and goodput(run, machines, 100).spares == hurried


def test_results_add_up_and_follow_from_the_seed() -> None:
    first, again, other = (goodput(RUN, cluster(stops_per_month=20), 200, seed) for seed in (1, 1, 2))
    assert first == again != other
    lost = sum(mean for mean, _ in first.losses.values())
    assert first.losses["planned stops"][0] > 0 and 0 < lost < 1
    assert first.goodput.low <= 1 - lost <= first.goodput.high
    assert first.ettr.median > first.goodput.median  # slow steps are kept
    assert first.days.median == pytest.approx(first.ideal_days.median / first.goodput.median, rel=5e-3)
    hours, cards = first.days.median * 24, 1024
    assert 0.8 < first.energy_mwh.median / (hours * cards * 700 / 1e6) <= 1


def test_saving_in_the_way_of_training_costs_more_than_beside_it() -> None:
    beside, before = (goodput(replace(RUN, asynchronous=way), KNOWN, 200) for way in (True, False))
    assert before.losses["saving"][0] > beside.losses["saving"][0]
    local = goodput(replace(RUN, local_every=10), KNOWN, 200)
    assert local.losses["lost work"][0] < beside.losses["lost work"][0] / 2


@pytest.mark.parametrize(
    ("dtype", "master", "optimiser"),
    [
        ("float32", "float32", "adamw"),
        ("bfloat16", "float32", "adamw"),
        ("bfloat16", "bfloat16", "adamw"),
        ("float32", "float32", "muon"),
        ("bfloat16", "float32", "muon"),
    ],
)
def test_a_checkpoint_is_as_large_as_what_is_saved(
    tiny_config: ModelConfig, dtype: str, master: str, optimiser: str
) -> None:
    model = Decoder(replace(tiny_config, dtype=dtype)).to(getattr(torch, dtype))
    train = TrainConfig.model_validate({"steps": 1, "master_dtype": master, "optimiser": optimiser})
    saved = sum(tensor.nbytes for tensor in local_tensors(model, make_optimiser(model, train)).values())
    assert state_bytes(model.config, train) == pytest.approx(saved, rel=0.02)  # norms are no matrices


@pytest.mark.parametrize(
    "wrong",
    [
        {"kinds": []},
        {"slow_factor": 0.5},
        {"start": [5, 4, 3]},
        {"unknown": 1},
        {"kinds": [{"name": "a", "share": 0, "detect": 1}]},
    ],
)
def test_what_cannot_be_believed_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Recovery.model_validate(wrong)


def test_the_shares_of_kinds_are_those_of_the_sources() -> None:
    kinds: tuple[Kind, ...] = Recovery().kinds
    assert sum(kind.share for kind in kinds) == pytest.approx(1, abs=0.01)


RUN_FILE = """
corpus = "nowhere"
[train]
steps = 5000
batch_tokens = 100000
[checkpoint]
local = "/dev/shm"
local_every = 5
"""


def plan(folder: Path, *arguments: object) -> Result:
    path = folder / "run.toml"
    path.write_text(RUN_FILE, encoding="utf-8")
    words = ["plan", "goodput", str(path), "--processes", "512", "--lives", "50", *map(str, arguments)]
    return CliRunner().invoke(app, words)


def test_the_command_tells_all_as_json(tmp_path: Path) -> None:
    found = json.loads(plan(tmp_path, "--tokens-per-second", "9000,10000,12000", "--vocab", 500, "--json").stdout)
    assert found["run"]["step"] == {"low": pytest.approx(100 / 12), "median": 10, "high": pytest.approx(100 / 9)}
    assert found["run"]["local_every"] == 5 and found["every"]["best"]["value"] % 5 == 0
    assert found["best"]["ettr"]["median"] >= found["now"]["ettr"]["median"] - 0.01
    assert set(found["now"]["losses"]) >= {"detection", "lost work", "saving", "stragglers"}


def test_the_command_says_what_to_do(tmp_path: Path) -> None:
    text = plan(tmp_path, "--step-seconds", 10, "--checkpoint-gib", 700, "--spares", 3).stdout
    assert "512 cards in 64 nodes" in text and "Save every" in text and "spare nodes cost the fewest" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vocab", 500], "--step-seconds 10"),
        (["--step-seconds", "10,9,8", "--vocab", 500], "three that rise"),
        (["--step-seconds", "9,10,inf", "--vocab", 500], "three that rise"),
        (["--step-seconds", "10"], "--checkpoint-gib"),
        (
            ["--step-seconds", "10", "--vocab", 500, "--set", "train.checkpoint_every=7"],
            "multiple of checkpoint.local_every",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[object], said: str) -> None:
    error = plan(tmp_path, *arguments).exception
    assert isinstance(error, LiaoyuanError) and said in str(error)

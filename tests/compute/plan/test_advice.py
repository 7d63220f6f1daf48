"""What can be trained in so many days, and what to buy: the answer holds, is the best there is, or is refused."""

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from liaoyuan.checkpoint.training_state import CheckpointConfig
from liaoyuan.cli.main import app
from liaoyuan.compute.plan import Cluster, Job, predict, read_cluster
from liaoyuan.compute.plan.advice import Asker, Outcome, Wish, family, largest, to_buy
from liaoyuan.compute.plan.advice.buy import GROWTH
from liaoyuan.compute.plan.goodput import availability
from liaoyuan.compute.plan.machine.profile import assumed
from liaoyuan.compute.plan.machine.recovery import Failures, Kind, Recovery
from liaoyuan.compute.plan.search.bounds import Memory
from liaoyuan.compute.plan.search.estimate import Estimate
from liaoyuan.compute.plan.search.search import Choice
from liaoyuan.compute.plan.span import Span, exactly
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout
from liaoyuan.rundir import Report, silent
from liaoyuan.training.loop import TrainConfig

H100 = read_cluster("h100")
RATE = 4e14  # FLOP/s of a card of `Formula`
DAY = 86400.0


@dataclass(frozen=True)
class Formula(Asker):
    """Steps take what their FLOPs take at one rate; a search finds them `ratio` times as long, and refuses some."""

    ratio: float = 1.0
    most_weights: float = math.inf
    calls: list[int] = field(default_factory=list)

    def sketched(self, job: Job, tokens: float) -> Outcome:
        return self._made(job, tokens, 1.0)

    def searched(self, job: Job, tokens: float, report: Report = silent) -> Outcome:
        self.calls.append(job.processes)
        if job.model.num_parameters() > self.most_weights:
            raise LiaoyuanError("it does not fit after all.")
        return self._made(job, tokens, self.ratio)

    def _made(self, job: Job, tokens: float, ratio: float) -> Outcome:
        seconds = job.flops / job.processes / RATE * ratio
        choice = Choice(job, Memory(0, 0, 0, 0, 0, 0), Estimate(seconds, seconds, seconds, 0.0))
        steps = math.ceil(tokens / job.tokens)
        days = exactly(steps * seconds / DAY)
        return Outcome(choice, self.cluster, RATE, steps, days, exactly(1.0), None, None, None)


def formula(**changes: Any) -> Formula:
    return Formula(H100, assumed(H100), CheckpointConfig(), None, 4, **changes)


def job_of(processes: int = 8, rows: int = 512, hidden: int = 1024, layers: int = 8, length: int = 2048) -> Job:
    values = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "torch_dtype": "bfloat16",
    }
    train = TrainConfig(steps=100, batch_tokens=rows * length)
    return Job(config_from_dict(values), Layout(), processes, length, train, "cuda")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(days=st.floats(0.5, 3000), ratio=st.floats(0.45, 3.0), processes=st.sampled_from([8, 64, 1024]))
def test_the_largest_is_the_last_that_the_search_finds_in_time(days: float, ratio: float, processes: int) -> None:
    wish, asker = Wish(days, vocab=4096), formula(ratio=ratio)
    models = family(wish.vocab)

    def needed(weights: float, flops: float) -> float:
        tokens = math.ceil(20 * weights / wish.batch_tokens) * wish.batch_tokens
        return 3 * tokens * flops / (processes * RATE) * ratio / DAY

    context = (wish.sequence_length + 1) / 2
    fit = [one for one in models if needed(one.num_parameters(), one.flops_per_token(context)) <= days]
    if not fit:
        with pytest.raises(LiaoyuanError, match="train no model of this family"):
            largest(asker, processes, wish)
        return
    found = largest(asker, processes, wish)
    assert found.days.median <= days and found.job.model.num_parameters() * 1.05 > fit[-1].num_parameters()
    assert len(asker.calls) <= 5


@settings(max_examples=5, deadline=None, derandomize=True)
@given(days=st.floats(10, 3000), ratio=st.floats(0.45, 3.0), most=st.floats(0.5, 200))
def test_what_a_search_refuses_is_not_the_answer(days: float, ratio: float, most: float) -> None:
    asker = formula(ratio=ratio, most_weights=most * 1e9)
    found = largest(asker, 1024, Wish(days))
    assert found.days.median <= days and found.job.model.num_parameters() <= most * 1e9
    unbound = largest(formula(ratio=ratio), 1024, Wish(days))
    if unbound.job.model.num_parameters() > most * 1e9:  # then memory is the limit, which is met within a factor
        assert found.job.model.num_parameters() > most * 1e9 / 1.35


def test_models_of_the_family_grow_without_gaps() -> None:
    sizes = [one.num_parameters() for one in family(128256)]
    steps = [large / small for small, large in itertools.pairwise(sizes)]
    assert min(steps) >= 1.04 and max(step for step, size in zip(steps, sizes, strict=False) if size > 2e9) < 1.3
    for one in family(4096):
        assert one.num_hidden_layers < 9 or 76 <= one.hidden_size / one.num_hidden_layers <= 136
        assert one.num_attention_heads % one.num_key_value_heads == 0
        assert one.head_dim * one.num_attention_heads == one.hidden_size


@settings(max_examples=8, deadline=None, derandomize=True)
@given(days=st.floats(0.05, 300), ratio=st.floats(0.45, 3.0), tokens=st.sampled_from([1e10, 1e12]))
def test_no_fewer_cards_would_do(days: float, ratio: float, tokens: float) -> None:
    job, asker = job_of(), formula(ratio=ratio)
    alone = 3 * tokens * job.model.flops_per_token((job.sequence_length + 1) / 2) / RATE * ratio / DAY  # on one card
    try:
        found = to_buy(asker, job, days, tokens)
    except LiaoyuanError as error:
        assert alone / days > 8 * 512 * 4 / GROWTH and "The fastest are" in str(error)  # rows x heads x layers
        return
    cards = found.job.processes
    assert found.days.median <= days and cards % H100.per_node == 0
    # Numbers that divide rows, heads and layers are a node or 5% apart where they are small, else at most a factor 2.
    assert cards <= max(H100.per_node, 2.001 * alone / days)
    assert all(other > cards or other * days < alone * 1.001 for other in asker.calls if other != cards)


def test_the_days_of_other_cards_are_known() -> None:
    slow = to_buy(formula(), job_of(), 30.0, 1e12).job.processes
    for ratio in (0.9, 0.7, 0.5):
        fast = to_buy(formula(ratio=ratio), job_of(), 30.0, 1e12).job.processes
        assert fast <= slow
        slow = fast


def asker_of(cluster: Cluster = H100, effective: Span | None = None, whole: int = 0) -> Asker:
    return Asker(cluster, assumed(cluster), CheckpointConfig(), effective, whole)


SMALL = {"tokens_per_weight": 20.0, "batch_tokens": 8 * 1024, "sequence_length": 1024, "vocab": 512}


def test_twice_the_days_never_a_smaller_model_and_it_fits() -> None:
    asker, before = asker_of(effective=exactly(0.9)), 0.0
    for days in (0.1, 0.2):
        found = largest(asker, 2, Wish(days, **SMALL))
        assert found.days.median <= days
        assert found.choice.bytes <= H100.accelerator.usable_bytes
        assert found.job.model.num_parameters() >= before
        before = found.job.model.num_parameters()


def faster(cluster: Cluster, factor: float) -> Cluster:
    card = cluster.accelerator
    peaks = {dtype: peak * factor for dtype, peak in card.peak_tflops.items()}
    return cluster.model_copy(update={"accelerator": card.model_copy(update={"peak_tflops": peaks})})


def test_faster_cards_are_fewer_and_failures_cost_days() -> None:
    job, pairs = job_of(rows=32, layers=2, length=512), H100.model_copy(update={"per_node": 2})
    days = 0.8 * asker_of(pairs).sketched(replace(job, processes=2), 1e11).days.median

    def cards(cluster: Cluster) -> int:
        return to_buy(asker_of(cluster), job, days, 1e11).job.processes

    assert cards(pairs) == 4
    assert cards(faster(pairs, 2.0)) == 2
    often = pairs.model_copy(update={"failures": Failures(low=2000, median=3500, high=5000)})
    seldom, more = (asker_of(one).sketched(job, 1e11) for one in (pairs, often))
    assert more.days.median > 1.05 * seldom.days.median and more.effective.median < seldom.effective.median


def test_the_share_of_the_time_is_what_failures_leave_or_what_is_given() -> None:
    job, tokens = job_of(processes=8, length=1024), 1e12
    half, whole = (asker_of(effective=exactly(share)).sketched(job, tokens).days.median for share in (0.5, 1.0))
    assert half == pytest.approx(2 * whole)

    # Known figures, saves that only hold up, one kind of failure: Daly's expected time.
    kind = Kind(name="process", share=1.0, detect=exactly(60.0))
    known = {name: exactly(1.0) for name in ("storage_share", "slow_while_saving", "slow_factor")}
    recovery = Recovery(kinds=(kind,), start=exactly(240.0), stall=exactly(5.0), slow_share=exactly(0.0), **known)
    failures = Failures(low=4000, median=4000, high=4000)
    cluster = H100.model_copy(update={"recovery": recovery, "failures": failures})
    found = asker_of(cluster).sketched(job, tokens)
    assert found.every
    step, mean = found.choice.seconds, DAY * 1000 / 4000
    expected = availability(found.every * step, 5.0, 300.0, mean)
    assert found.effective.median == pytest.approx(expected, rel=0.02)
    assert found.days.median == pytest.approx(whole / expected, rel=0.02)


def test_what_is_bought_holds_by_the_whole_prediction() -> None:
    job = job_of(rows=16, hidden=256, layers=2, length=256)
    found = to_buy(asker_of(whole=1), job, 400.0, 1e12)
    step = predict(found.job, H100, assumed(H100)).step.seconds
    assert found.choice.found and found.choice.found.seconds == step and found.choice.found.fits
    assert found.steps == math.ceil(1e12 / job.tokens)
    assert found.days.low < found.days.median <= 400.0 and found.days.median < found.days.high
    assert found.days.median == pytest.approx(found.steps * step.median / DAY / found.effective.median, rel=0.1)


@pytest.mark.parametrize("days", [0.0, -1.0, math.nan, math.inf])
def test_days_that_make_no_sense_are_refused(days: float) -> None:
    with pytest.raises(LiaoyuanError, match=r"days is .* a number above 0"):
        to_buy(formula(), job_of(), days, 1e12)
    with pytest.raises(LiaoyuanError, match=r"days is .* a number above 0"):
        largest(formula(), 8, Wish(days))


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(LiaoyuanError, match="processes is 0: it must be a number above 0"):
        largest(formula(), 0, Wish(30))
    with pytest.raises(LiaoyuanError, match=r"no row of 8,192.*batch_tokens"):
        largest(formula(), 8, Wish(30, batch_tokens=100))
    with pytest.raises(LiaoyuanError, match=r"smallest has .* At their peak the cards would take"):
        largest(asker_of(), 1, Wish(1e-3))
    with pytest.raises(LiaoyuanError, match=r"smallest has .* legal on 4,099 processes"):
        largest(asker_of(), 4099, Wish(30.0, **SMALL))
    with pytest.raises(LiaoyuanError, match="does not fit after all"):
        to_buy(formula(most_weights=1.0), job_of(), 30.0, 1e12)


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


ROWS = ("--batch-tokens", 8192, "--sequence-length", 1024, "--vocab", 512)


def test_the_largest_is_told_as_json() -> None:
    found = run("largest", "--processes", 2, "--days", 0.2, "--whole", 0, "--effective", 0.9, *ROWS)
    assert found["weights"] > 1e8 and found["days"]["median"] <= 0.2 and found["memory_share"] <= 1
    assert found["processes"] == 2 and found["save_every"] is None
    assert found["effective"] == {"low": 0.9, "median": 0.9, "high": 0.9}
    assert found["card_hours"]["median"] == pytest.approx(found["days"]["median"] * 24 * 2)


MODEL = ("hidden_size=256", "intermediate_size=512", "num_hidden_layers=2", "num_attention_heads=4")


def test_what_to_buy_is_told_of_each_kind() -> None:
    keys = (f"model.{one}" for one in MODEL)
    given = [part for one in (*keys, "train.steps=10", "train.batch_tokens=65536") for part in ("--set", one)]
    buy = ("buy", *given, "--vocab", 512, "--tokens", 1e12, "--whole", 0)
    found = run(*buy, "--days", 2, "--clusters", "h100,ascend-910b")
    assert set(found) == {"h100", "ascend-910b"}
    fast, slow = (found[name] for name in ("h100", "ascend-910b"))
    assert 0 < fast["processes"] <= slow["processes"]
    assert fast["days"]["median"] <= 2 and 0 < fast["effective"]["median"] < 1 and fast["save_every"] >= 1
    assert "The fastest are" in run(*buy, "--days", 0.01, "--clusters", "h100")["h100"]["refused"]
    with pytest.raises(LiaoyuanError, match="no cluster 'h1000', did you mean"):
        run(*buy, "--clusters", "h100,h1000")
    with pytest.raises(LiaoyuanError, match="--effective 2: write a share"):
        run(*buy, "--effective", 2)


def test_shapes_are_told_from_the_best() -> None:
    found = run("shapes", "--cluster", "h100", "--hidden", 2048, "--tokens", 4096)
    assert found["card"] == "H100-SXM-80GB"
    of_kind = {what: [one for one in found["suits"] if one["what"] == what] for what in ("hidden_size", "head_dim")}
    for ones in of_kind.values():
        shares = [one["efficiency"] for one in ones]
        assert ones and shares == sorted(shares, reverse=True) and all(0 < share <= 1 for share in shares)
        for one in ones:  # what is lost and what is got make all of the time
            assert one["efficiency"] + sum(one["lost"].values()) == pytest.approx(1, abs=0.02)
    with pytest.raises(LiaoyuanError, match="There is no cluster 'nowhere'"):
        run("shapes", "--cluster", "nowhere")

"""Work is what a call computes and moves; a card takes the longer for it, the more there is and the less it gives."""

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan.machine.cluster import cluster_names, read_cluster
from liaoyuan.compute.plan.machine.cost import efficiency, rate_of, seconds
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, OperatorRate, assumed, read_profile
from liaoyuan.compute.plan.program.apart import apart
from liaoyuan.compute.plan.program.dry_run import Job, dry_run
from liaoyuan.compute.plan.program.trace import Event
from liaoyuan.compute.plan.program.work import Work, product, stream, work_of
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout
from liaoyuan.training.loop import TrainConfig
from tests.conftest import slow_if
from tests.parallel.layouts import MODELS

LENGTH = 64
PROFILES = {name: assumed(read_cluster(name)) for name in cluster_names()}
RUNS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", 1, {}, {}),
    "tp 2, recomputed": ("dense", 4, {"tp": 2, "recompute": "full"}, {}),
    "ring 2 x ulysses 2": ("dense", 4, {"cp": {"ring": 2, "ulysses": 2}}, {}),
    "tied, muon": ("tied", 2, {}, {"optimiser": "muon"}),
    "experts": ("experts", 2, {"ep": 2}, {}),
    "latent": ("latent", 1, {}, {"master_dtype": "bfloat16"}),
    "window and sinks": ("sinks", 1, {}, {}),
}


@functools.cache
def events_of(name: str) -> list[Event]:
    kind, processes, axes, train = RUNS[name]
    config = config_from_dict(MODELS[kind] | {"torch_dtype": "bfloat16", "num_hidden_layers": 2})
    settings = TrainConfig(steps=2, batch_tokens=16 * LENGTH, microbatches=2, clip=0.01, **train)
    return apart(dry_run, Job(config, Layout(**axes), processes, LENGTH, settings), 0).events


@pytest.mark.parametrize("name", [slow_if(name == "experts", name) for name in RUNS])
def test_products_have_the_flops_that_the_operators_count(name: str) -> None:
    counted: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for event in events_of(name):
        work = work_of(event)
        if work.kind == "product":
            shapes = work.products
            assert shapes
            counted[event.operator] += event.flops
            told[event.operator] += sum(2 * math.prod(shape) for shape in shapes) * work.batch
            assert work.dtype == ("float32" if event.dtype.itemsize == 4 else "bfloat16")
        if work.kind == "attention":  # two products of a head's size over what is seen; backward five
            assert work.flops == pytest.approx(
                (5 if work.backward else 2) * 2 * work.m * work.n * work.batch * work.k, rel=0.2
            )
    assert counted
    assert told == counted


def test_a_ring_multiplies_in_the_dtype_of_its_queries_whatever_it_sums_in() -> None:
    found = {e.operator: work_of(e).dtype for e in events_of("ring 2 x ulysses 2") if "block_attention" in e.operator}
    assert found == {"block_attention": "bfloat16", "block_attention_backward": "bfloat16"}


def test_what_is_no_work_of_the_card_costs_nothing() -> None:
    events = events_of("tp 2, recomputed")
    idle = {e.operator for e in events if not seconds(work_of(e), PROFILES["h100"])}
    assert {"aten._unsafe_view", "c10d._allgather_base_"} <= idle
    assert not {name for name in idle if not name.startswith(("c10d.", "aten._unsafe_view"))}


def test_what_a_lookup_a_partial_copy_and_a_change_in_place_move() -> None:
    works: dict[str, list[tuple[Event, Work]]] = {}
    for event in events_of("tp 2, recomputed"):
        works.setdefault(event.operator, []).append((event, work_of(event)))
    event, work = works["aten.embedding"][0]
    tokens, width = event.shapes[-1]
    assert work.traffic == tokens * (2 * width * 2 + 8)  # rows read and written, and their numbers
    event, work = works["fsdp.all_gather_copy_in"][0]
    assert work.traffic == 2 * 2 * sum(math.prod(shape) for shape in event.shapes[:-3])
    event, work = works["aten._fused_adamw_"][0]
    assert work.traffic == pytest.approx(7 / 4 * event.traffic)


def test_a_head_whose_logits_are_not_kept_is_computed_thrice() -> None:
    kept = next(e for e in events_of("dense") if e.operator == "loss_head_backward")
    anew = replace(kept, shapes=tuple((0, s[1]) if i == 7 else s for i, s in enumerate(kept.shapes)))
    assert len(work_of(kept).products) == 2
    assert len(work_of(anew).products) == 3
    assert work_of(anew).flops == 1.5 * work_of(kept).flops


sizes = st.integers(1, 5000)
profiles = st.sampled_from(sorted(PROFILES)).map(PROFILES.__getitem__)
cached = st.tuples(profiles, st.floats(0, 1e8), st.floats(1, 8)).map(
    lambda x: x[0].model_copy(update={"cached_bytes": x[1], "cached_speed": x[2]})
)
products = st.builds(product, sizes, sizes, sizes, st.sampled_from(["bfloat16", "float32"]), st.integers(1, 64))


def sided_as(work: Work, backward: bool) -> Work:
    return replace(work, backward=backward, flops=work.flops * (1 + backward))


sided = st.builds(sided_as, products, st.booleans())
works = st.one_of(sided, st.floats(1, 1e10).map(stream))


@settings(deadline=None, max_examples=150)
@given(works, cached, st.sampled_from(["memory", "products", "attention_forward", "cached_bytes", "cached_speed"]))
def test_a_card_that_gives_more_is_never_slower(work: Work, profile: DeviceProfile, what: str) -> None:
    if what.startswith("cached"):
        better = profile.model_copy(update={what: getattr(profile, what) * 1.5 + 1})
    else:
        better = profile.with_figures(
            lambda name, figure: Figure(median=figure.median * 1.5) if name.startswith(what) else figure
        )
    assert seconds(work, better) <= seconds(work, profile) * (1 + 1e-12)


@settings(deadline=None, max_examples=150)
@given(sizes, sizes, sizes, st.integers(1, 8), st.sampled_from("mnkb"), st.booleans(), profiles)
def test_two_halves_never_cost_less_than_the_whole(
    m: int, n: int, k: int, batch: int, cut: str, backward: bool, profile: DeviceProfile
) -> None:
    half = sided_as(product(m, n, k, batch=batch), backward)
    twice = {axis: 2 if axis == cut else 1 for axis in "mnkb"}
    whole = product(m * twice["m"], n * twice["n"], k * twice["k"], batch=batch * twice["b"])
    assert seconds(sided_as(whole, backward), profile) <= 2 * seconds(half, profile) * (1 + 1e-12)


@settings(deadline=None, max_examples=50)
@given(products, profiles)
def test_no_shape_is_faster_than_the_peak(work: Work, profile: DeviceProfile) -> None:
    rate = rate_of(work.dtype, profile)  # of cards without such products, that of those that stand in for them
    assert 0 < efficiency(work, rate) <= 1
    assert seconds(work, profile) >= work.flops / (rate.peak_tflops * 1e12 * rate.share.median)


def test_a_wave_more_is_paid_whole() -> None:
    """132 units with tiles of 128 x 256: a column of tiles more than fits needs a second wave for hardly more work."""
    rate = PROFILES["h100"].products["bfloat16"].model_copy(update={"least": (128, 256)})
    full, ragged = product(132 * 128, 256, 8192), product(133 * 128, 256, 8192)
    assert efficiency(full, rate) > 0.98
    assert 133 / 264 < efficiency(ragged, rate) < 0.7  # cutting the depth saves a part of it
    shallow = product(133 * 128, 256, 256)
    assert efficiency(shallow, rate) == pytest.approx(133 / 264 * 256 / (256 + rate.half_k), rel=0.01)


def test_what_was_measured_of_an_operator_takes_the_place_of_what_is_usual() -> None:
    usual = PROFILES["h100"]
    own = usual.model_copy(update={"operators": {"rms_norm.bfloat16": OperatorRate(share=0.25, calls=2.0)}})
    norm, other = replace(stream(1e9), operator="rms_norm"), replace(stream(1e9), operator="swiglu")
    assert seconds(norm, own) == pytest.approx(4 * seconds(norm, usual), rel=0.01)
    assert seconds(other, own) == seconds(other, usual)


def test_a_profile_is_read_as_it_was_written(tmp_path: Any) -> None:
    profile = PROFILES["h100"].model_copy(update={"operators": {"linear.bfloat16": OperatorRate(share=0.9)}})
    profile.save(tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    (tmp_path / "profile.json").write_text(profile.model_dump_json().replace('"version":1', '"version":0'))
    with pytest.raises(LiaoyuanError, match="calibrate again"):
        read_profile(tmp_path / "profile.json")

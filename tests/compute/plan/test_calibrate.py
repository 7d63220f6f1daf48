"""Calibration finds again what a machine gives, though some timings are spoilt; and the command writes it whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from liaoyuan.cli.main import app
from liaoyuan.compute.plan import Job
from liaoyuan.compute.plan.calibration import calibrate as room
from liaoyuan.compute.plan.calibration.calibrate import Measured, Small, fitted, measure, prepare
from liaoyuan.compute.plan.calibration.calls import Clock, Step, Timed, streams
from liaoyuan.compute.plan.calibration.fit import fit
from liaoyuan.compute.plan.calibration.measured_links import (
    KINDS,
    ROUNDS,
    SIZES,
    Links,
    Travelled,
    _is_wanted,
    _sent,
    with_links,
)
from liaoyuan.compute.plan.machine.cluster import read_cluster
from liaoyuan.compute.plan.machine.cost import seconds
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import (
    Carry,
    DeviceProfile,
    Figure,
    LinkRate,
    OperatorRate,
    assumed,
    read_profile,
)
from liaoyuan.compute.plan.machine.suits import suits
from liaoyuan.compute.plan.program.work import Work, product, stream
from liaoyuan.compute.plan.step.prices import Prices
from liaoyuan.device import Device
from liaoyuan.models import ModelConfig
from liaoyuan.parallel import Layout
from liaoyuan.parallel.traffic import Collective
from liaoyuan.training.loop import TrainConfig

CPU = read_cluster("cpu")
TINY = (Small(32, 64, 2, 16, 64, 2, 16), Small(64, 96, 2, 32, 96, 2, 32), Small(32, 32, 2, 16, 64, 2, 16, experts=4))
SHAPES = ((64, 64, 64), (512, 128, 384), (512, 512, 512), (1024, 256, 1024), (2048, 512, 256), (128, 2048, 512))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_a_tenth_of_the_timings_may_be_spoilt(rate: float, call: float, seed: int) -> None:
    sizes = np.geomspace(0.1, 100, 20)
    draw = np.random.default_rng(seed)
    took = (call + sizes / rate) * np.exp(draw.normal(0, 0.01, len(sizes)))
    spoilt = draw.choice(len(sizes), 2, replace=False)
    took[spoilt] *= draw.uniform(2, 10, 2)
    found, off = fit(lambda x: x[0] + sizes / x[1], np.ones(2), took)
    assert found[0] + sizes / found[1] == pytest.approx(call + sizes / rate, rel=0.1)
    assert set(np.argsort(-np.abs(off))[:2]) == set(spoilt)


def nothing() -> None:
    raise AssertionError("no call is made")


def works() -> list[Work]:
    made = list[Work]()
    for size in np.geomspace(1e5, 2e8, 8):
        made += [replace(stream(float(size), "float32"), operator=name) for name in ("copy_", "mul_", "rms_norm")]
    for m, n, k in SHAPES:
        forward = replace(product(m, n, k, "float32", size=4), operator="linear")
        made += [forward, replace(forward, operator="linear_backward", backward=True, flops=2 * forward.flops)]
        made.append(Work("attention", "float32", 4.0 * m * n * k, 12.0 * m * k, m, n, k, 4, operator="attention"))
    return made


def test_a_machine_that_is_as_the_model_has_it_is_found_again() -> None:
    truth = assumed(CPU).model_copy(
        update={
            "memory": Figure(median=8e9),
            "cached_bytes": 4e6,
            "cached_speed": 3.0,
            "call": Figure(median=4e-6),
            "launch": Figure(median=2e-5),
            "operators": {
                "copy_.float32": OperatorRate(share=1.0, near=3.0),
                "mul_.float32": OperatorRate(share=1.0, near=3.0),
                "rms_norm.float32": OperatorRate(share=0.5, near=1.2, calls=3.0),
                "linear_backward.float32": OperatorRate(share=0.7, half=(8.0, 2.0, 32.0)),
            },
        }
    )
    draw = np.random.default_rng(0)
    calls = tuple(
        (Timed(f"{number}", work, nothing), seconds(work, truth) * float(np.exp(draw.normal(0, 0.005))))
        for number, work in enumerate(works())
    )
    steps = tuple(
        (Step(str(size), tuple(works()[:size]), nothing), sum(seconds(work, truth) + 2e-5 for work in works()[:size]))
        for size in (3, 6, 9, 20)
    )
    found = fitted(assumed(CPU), Measured(calls, steps))
    for work, (_, took) in zip(works(), calls, strict=True):
        assert seconds(work, found) == pytest.approx(took, rel=0.08)
    assert found.launch.median == pytest.approx(2e-5, rel=0.1)
    assert found.memory.median == pytest.approx(8e9, rel=0.1)
    between = replace(product(768, 768, 768, "float32", size=4), operator="linear_backward", backward=True)
    between = replace(between, flops=2 * between.flops)
    assert seconds(between, found) == pytest.approx(seconds(between, truth), rel=0.05)  # a shape that was not timed


def test_links_that_are_as_the_fabric_has_them_are_found_again() -> None:
    truth = assumed(CPU)
    rate = LinkRate(share=Figure(median=1.7), latency=Figure(median=3e-4))
    fabric = Fabric(CPU, truth.model_copy(update={"links": {CPU.links[0].name: rate}}))
    travelled = tuple(
        Travelled(kind, _sent(kind, size, 4), fabric.transfer(kind, _sent(kind, size, 4), (0, 1, 2, 3)).seconds)
        for kind in KINDS
        for size in SIZES
    )
    found = with_links(truth, CPU, Links(4, travelled, 1.25))
    assert found.links[CPU.links[0].name].share.median == pytest.approx(1.7, rel=0.01)
    assert found.links[CPU.links[0].name].latency.median == pytest.approx(3e-4, rel=0.01)
    assert found.contention.median == 1.25


def test_what_cores_compute_for_messages_is_found_again() -> None:
    bytes_of = {"all-gather": 6e-10, "reduce-scatter": 2e-9}
    travelled = tuple(
        Travelled(kind, _sent(kind, size, 2), 1e-3, 2e-4 + bytes_of[kind] * _sent(kind, size, 2))
        for kind in bytes_of
        for size in SIZES
    )
    found = with_links(assumed(CPU), CPU, Links(2, travelled, 1.5, asking=1e-4))
    for kind, byte in bytes_of.items():
        assert found.carrying[kind].message == pytest.approx(2e-4, rel=0.02)
        assert found.carrying[kind].byte == pytest.approx(byte, rel=0.02)
    assert with_links(assumed(CPU), CPU, Links(2, travelled, 1.5)).carrying == {}  # a card's own engines carry them
    prices = {taken: Prices(found, Fabric(CPU, found), streams=False, crowd=2.0, full=taken) for taken in (False, True)}
    message = Collective("shard", "all-gather", (0, 1), 10**6)
    assert prices[True].carried(message) == pytest.approx(2 * (2e-4 + 6e-4), rel=0.02)
    assert prices[False].carried(message) == 0 and prices[False].contention == 1.5


@pytest.mark.parametrize(
    ("device", "processes", "takes"), [("cpu", 1, 0), ("cpu", 2, 1), ("cpu", 4, 2), ("cuda", 4, 0)]
)
def test_messages_take_cores_from_computing_where_each_has_a_process(device: str, processes: int, takes: int) -> None:
    """This machine has two cores: of four processes two share one, and so does what carries their messages."""
    profile = assumed(CPU).model_copy(update={"carrying": {"all-gather": Carry(message=1.0, byte=0.0)}})
    job = Job(ModelConfig("qwen3", 64, 32, 64, 1, 2, 2, 16, 64), Layout(), processes, 16, TrainConfig(steps=1), device)
    assert Prices.of(job, CPU, profile).carried(Collective("shard", "all-gather", (0, 1), 8)) == takes


def test_each_kind_of_collective_is_told_by_what_it_was_measured_at() -> None:
    """Gloo makes of a reduce-scatter an all-reduce: half the speed of an all-gather, by the same link."""
    level = CPU.links[0]
    faster, longer = {"reduce-scatter": 0.5, "all-to-all": 1.4}, {"reduce-scatter": 1.5, "all-to-all": 0.5}

    def took(kind: str, sent: float) -> float:
        steps = 2 if kind == "all-reduce" else 1
        speed = level.bandwidth_gb * 1e9 * 0.6 * faster.get(kind, 1.0)
        return steps * 2e-4 * longer.get(kind, 1.0) + sent / speed

    sizes = [(kind, _sent(kind, size, 2)) for kind in KINDS for size in SIZES]
    travelled = tuple(Travelled(kind, sent, took(kind, sent)) for kind, sent in sizes)
    found = with_links(assumed(CPU), CPU, Links(2, travelled, 1.0))
    told = Fabric(CPU, found)
    for one in travelled:
        assert told.transfer(one.kind, one.sent, (0, 1)).seconds == pytest.approx(one.seconds, rel=0.02)
    assert DeviceProfile.model_validate_json(found.model_dump_json()) == found
    counts = told.transfer("all-to-all of counts", 64.0, (0, 1))
    assert counts.latency == pytest.approx(1e-4, rel=0.02)  # an exchange of counts is one like others
    moved = found.with_figures(lambda name, figure: figure.at(1.0) if "share" in name else figure)
    assert moved.links[level.name].kinds == found.links[level.name].kinds


def test_an_operator_that_was_timed_small_alone_tells_nothing_of_its_rate() -> None:
    """Of a sum of 8 numbers that took long no conclusion is drawn for a million: 450 ms were told once, for 9."""
    plain = [work for work in works() if work.operator in ("copy_", "mul_")]
    small = [replace(stream(float(size), "float32"), operator="sum") for size in (64, 512, 4096)]
    timed = [(Timed(work.operator, work, nothing), seconds(work, assumed(CPU))) for work in plain]
    timed += [(Timed("sum", work, nothing), 2e-5 * (1 + number)) for number, work in enumerate(small)]
    steps = (Step("step.one", tuple(plain), nothing), Step("step.two", tuple(plain[:2]), nothing))
    found = fitted(assumed(CPU), Measured(tuple(timed), tuple((step, 1.0) for step in steps)))
    large = stream(4e6, "float32")
    told = seconds(replace(large, operator="sum"), found)
    assert told == pytest.approx(seconds(large, found) + seconds(small[1], found), rel=0.2)


@pytest.mark.parametrize("speed", [1e9, 1e7])
def test_slow_links_are_timed_with_fewer_and_smaller_messages(speed: float) -> None:
    found = dict[tuple[str, int], float]()
    timings = 0
    for turn in range(ROUNDS):
        for size in SIZES:
            if _is_wanted(found, "send", size, turn):
                found["send", size] = size / speed
                timings += 1
    assert len(found) >= 5  # of six sizes: enough to tell a latency from a bandwidth
    assert timings == (24 if speed == 1e9 else 3 * 4 + 2 * 2)
    assert sum(found.values()) < 2.0


def test_every_call_of_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CPU_MODELS", TINY)
    monkeypatch.setattr("liaoyuan.compute.plan.calibration.calls.STREAM_BYTES", (4096, 65_536, 1 << 20))
    monkeypatch.setattr(room, "LEAST_ROUNDS", 1)
    calls, steps = prepare(Device("cpu"), ("float32",))
    found = measure(calls, steps, Clock(Device("cpu")), 0.0)
    known = {call.work.operator for call, _ in found.calls}
    assert {"linear", "linear_backward", "attention_backward", "loss_head", "grouped_linear", "swiglu", "add"} <= known
    assert sum(call.work.kind == "product" for call, _ in found.calls) >= 12
    assert all(0 < took < 5 for _, took in found.calls)
    for step, whole in found.steps:  # the calls of a step are parts of it
        assert sum(step.watch()) > 0 and len(step.watch()) == len(step.works) == len(step.names)
        assert whole > 0
    profile = fitted(assumed(CPU), found)
    assert all(f"{work.operator}.{work.dtype}" in profile.operators for work in steps[0].works if seconds(work, profile)
               and work.operator != "_local_scalar_dense")  # fmt: skip


def test_streams_are_what_they_are_called() -> None:
    found = {call.work.operator: call for call in streams(Device("cpu"), torch.float32) if call.work.traffic < 3e5}
    size = 65_536
    assert {name: call.work.traffic for name, call in found.items()} == {
        "add": 3 * size, "copy_": 2 * size, "mul_": 2 * size}  # fmt: skip
    assert [float(call.make().flatten()[0]) for call in found.values()] == [2.0, 1.0, 1.0]


def calibrated(monkeypatch: pytest.MonkeyPatch, made: Callable[..., DeviceProfile], *words: str) -> Any:
    monkeypatch.setattr(room, "calibrate", made)
    return CliRunner().invoke(app, ["plan", "calibrate", "--processes", "1", "--device", "cpu", *words])


def test_the_command_writes_a_profile_that_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    result = calibrated(monkeypatch, lambda cluster, *_: assumed(cluster), "--output", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert read_profile(path) == assumed(CPU) == DeviceProfile.model_validate(json.loads(result.stdout))


def test_a_calibration_that_is_stopped_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> DeviceProfile:
        raise KeyboardInterrupt

    (tmp_path / "profile.json").write_text("as it was")
    result = calibrated(monkeypatch, stopped, "--output", str(tmp_path / "profile.json"))
    assert result.exit_code != 0
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
    assert (tmp_path / "profile.json").read_text() == "as it was"


def test_sizes_that_fill_tiles_suit_a_card_better() -> None:
    h100 = assumed(read_cluster("h100"))
    found = {(one.what, one.value, one.rows): one for one in suits(h100, 4096)}
    wide = [one for one in found.values() if one.what == "intermediate_size"]
    assert wide == sorted(wide, key=lambda one: -one.efficiency)
    assert found["hidden_size", 4096, 8192].efficiency > found["hidden_size", 4032, 8192].efficiency
    assert found["head_dim", 128, 8192].efficiency > found["head_dim", 64, 8192].efficiency
    few, many = found["expert", 1536, 16], found["expert", 1536, 4096]
    assert few.efficiency < 0.2 < 0.9 < many.efficiency
    assert max(few.lost, key=few.lost.__getitem__) == "memory"  # each expert's weights are read for 16 rows
    assert all(one.efficiency + sum(one.lost.values()) == pytest.approx(1, abs=0.05) for one in found.values())
    assert all(one.value % 4 == 0 for one in suits(h100, 4096, tp=4) if one.what == "hidden_size")

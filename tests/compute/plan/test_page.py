"""Promises of the page of a plan: what it shows is in the prediction, and it can be drawn whatever is missing."""

import re
from dataclasses import replace

import pytest

from liaoyuan.compute.plan.page import BACKWARD, FORWARD, HOST, MESSAGE, UPDATE, kind_of, plan_page
from liaoyuan.compute.plan.program.trace import Held
from liaoyuan.compute.plan.span import Span
from liaoyuan.compute.plan.step.predict import Memory, Prediction
from liaoyuan.compute.plan.step.step_time import Bar, StepTime

GIB = 2**30
BARS = (
    Bar("compute", 0.0, 1.0, "forward linear"),
    Bar("compute", 1.5, 3.0, "backward linear"),
    Bar("compute", 3.5, 4.0, "update adamw_step"),
    Bar("fsdp", 0.5, 1.5, "all-gather"),
    Bar("launch", 0.0, 0.1, "linear"),
)
MEMORY = Memory(
    rank=0,
    stage="stage 0 of 2",
    tensors=10 * GIB,
    lasting=4 * GIB,
    allowance={"fragments": Span(0.5 * GIB, GIB, 2 * GIB)},
    total=Span(10.5 * GIB, 11 * GIB, 12 * GIB),
    room=20 * GIB,
    held=(Held("layers.*.mlp.down_proj", "linear", "forward", 6 * GIB, 12), Held("", "empty", "update", 4 * GIB, 3)),
    timeline=((0.0, 4 * GIB), (2.0, 10 * GIB), (4.0, 4 * GIB)),
)
FOUND = Prediction(
    step=StepTime(Span(3.6, 4.0, 4.4), 3.0, {"fsdp": 0.5, "bubble": 0.5, "tp": 0.0}, BARS),
    memory=(MEMORY,),
    tokens_per_second=Span(900.0, 1000.0, 1100.0),
    model_utilisation=Span(0.36, 0.4, 0.44),
    hardware_utilisation=Span(0.45, 0.5, 0.55),
    bubble=0.125,
    width={"links.rail.share": 0.7, "memory": 0.3},
    rests_on="the makers' figures",
)


def test_the_page_tells_what_the_prediction_has() -> None:
    text = plan_page("a job", FOUND).html()
    plain = re.sub(r"<[^>]+>", " ", text)
    for told in ("4 s", "3.6 to 4.4 s", "1,000", "40.0%", "50.0%", "55%", "it fits", "75.0%", "12.5%", "6.00", "20.00"):
        assert told in plain, told
    assert "links.rail.share" in plain
    assert "messages of tp" not in plain  # nobody waits for it


def test_a_card_that_is_too_small_is_told() -> None:
    small = replace(FOUND, memory=(replace(MEMORY, room=10 * GIB),))
    assert "it does NOT fit" in plan_page("a job", small).html()


def test_a_prediction_without_details_has_a_page_too() -> None:
    bare = replace(FOUND, step=replace(FOUND.step, bars=()), memory=(replace(MEMORY, held=(), timeline=()),), width={})
    assert "What goes on when" not in plan_page("a job", bare).html()


@pytest.mark.parametrize(("bar", "kind"), [*zip(BARS, (FORWARD, BACKWARD, UPDATE, MESSAGE, HOST), strict=True)])
def test_a_bar_has_the_colour_of_what_it_is(bar: Bar, kind: int) -> None:
    assert kind_of(bar) == kind

"""Layouts that do not fit are refused with the reason and the nearest one that does."""

import time

import pytest

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import config_from_dict
from liaoyuan.parallel import Layout, Shape, resolve
from tests.parallel.layouts import MODELS

DENSE, EXPERTS = (config_from_dict(MODELS[kind]) for kind in ("dense", "experts"))


@pytest.mark.parametrize(
    ("layout", "processes", "said"),
    [
        ({"tp": 8}, 8, "tp = 8 does not divide the 4 key-value heads.*nearest layout that fits: fsdp 2 x tp 4"),
        ({"fsdp": 2, "tp": 2}, 8, "make 4 processes, but there are 8"),
        ({"tp": 3}, 4, "3 processes of the other axes do not divide the 4"),
        ({"pp": 8}, 8, "8 pipeline stages are more than the 4 layers"),
        ({"pp": 2, "schedule": "zbv"}, 2, "needs at least 4 microbatches"),
        ({"ep": 2}, 2, "the model has no experts"),
        ({"tp": 2, "pp": 2, "exact": True}, 4, "exact is for the axes dp, fsdp, tp and ep.*: fsdp 2 x tp 2"),
        ({"cp": {"ulysses": 16}}, 16, "ulysses = 16 does not divide the 8 heads"),
    ],
)
def test_the_reason_is_named(layout: dict, processes: int, said: str) -> None:
    with pytest.raises(LiaoyuanError, match=said):
        resolve(Layout.model_validate(layout), processes, Shape(DENSE, 48, 8))


def test_what_is_left_is_sharded() -> None:
    assert resolve(Layout(tp=2), 8, Shape(DENSE, 48, 8)).fsdp == 4


def test_ten_thousand_cards_are_refused_in_seconds_too() -> None:
    for model in (DENSE, EXPERTS):
        start = time.process_time()
        with pytest.raises(LiaoyuanError, match="tp = 8 does not divide"):
            resolve(Layout(tp=8, ep=2 if model.experts else 1), 10240, Shape(model, 4096, 10240))
        assert time.process_time() - start < 60

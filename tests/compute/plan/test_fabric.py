"""A message takes its latency and its bytes over the links that it crosses, and never less for a slower link."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liaoyuan.compute.plan.machine.cluster import Cluster, read_cluster
from liaoyuan.compute.plan.machine.fabric import Fabric
from liaoyuan.compute.plan.machine.profile import DeviceProfile, Figure, LinkRate, assumed

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send", "broadcast")
NEAR, FAR = 100e9, 10e9  # bytes/s of a card inside and outside of a node of 8
SOON, LATE = 1e-6, 10e-6  # seconds of a step


def cluster(near: float = NEAR, far: float = FAR, oversubscription: float = 1.0) -> tuple[Cluster, DeviceProfile]:
    found = read_cluster("h100")
    links = tuple(
        link.model_copy(update={"bandwidth_gb": speed / 1e9, "oversubscription": crowded})
        for link, speed, crowded in zip(found.links, (near, far), (1.0, oversubscription), strict=True)
    )
    rates = {
        link.name: LinkRate(share=Figure(median=1.0), latency=Figure(median=step))
        for link, step in zip(links, (SOON, LATE), strict=True)
    }
    return found.model_copy(update={"links": links}), assumed(found).model_copy(update={"links": rates})


def taken(kind: str, sent: float, ranks: tuple[int, ...] | range, **changes: float) -> float:
    return Fabric(*cluster(**changes)).transfer(kind, sent, ranks).seconds


def test_a_ring_in_a_node_takes_a_step_for_each_other_card() -> None:
    assert math.isclose(taken("all-gather", 7e9, range(8)), 7e9 / NEAR + 7 * SOON)


def test_an_all_reduce_goes_round_twice_and_small_ones_climb_a_tree() -> None:
    large, small = taken("all-reduce", 14e9, range(64)), taken("all-reduce", 64.0, range(1024))
    outside = (7 / 8 / 8) / (63 / 64)  # of the bytes of a card
    inside = (7 / 8) / (63 / 64)
    assert math.isclose(large, 14e9 * max(outside / FAR, inside / NEAR) + 2 * (56 * SOON + 7 * LATE), rel_tol=1e-3)
    assert math.isclose(small, 2 * (7 * SOON + (7 + 1) * LATE), rel_tol=1e-3)  # 128 nodes are seven doublings


def test_gathering_among_many_cards_waits_for_each_of_them() -> None:
    assert math.isclose(taken("all-gather", 0.0, range(1024)), 896 * SOON + 127 * LATE)


def test_sisters_of_a_group_across_nodes_use_the_far_link_alone() -> None:
    assert math.isclose(taken("reduce-scatter", 3e9, range(0, 32, 8)), 3e9 / FAR + 3 * LATE)


def test_most_of_an_exchange_among_nodes_crosses_the_far_link() -> None:
    assert math.isclose(taken("all-to-all", 63e9, range(64)), 56e9 / FAR + SOON + LATE)


def test_a_send_crosses_the_one_link_between_the_two() -> None:
    assert math.isclose(taken("send", 1e9, (0, 7)), 1e9 / NEAR + SOON)
    assert math.isclose(taken("send", 1e9, (0, 8)), 1e9 / FAR + LATE)


def test_oversubscribed_links_are_slower_by_as_much() -> None:
    plain, crowded = (taken("send", 1e9, (0, 8), oversubscription=over) for over in (1.0, 4.0))
    assert math.isclose(crowded - LATE, 4 * (plain - LATE))


def test_a_group_of_one_sends_nothing() -> None:
    assert all(taken(kind, 0.0, (3,)) == 0 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    sent=st.floats(0, 1e12),
    more=st.floats(1, 100),
    group=st.tuples(st.integers(0, 9), st.integers(2, 600), st.integers(1, 20)),
    faster=st.floats(1, 8),
)
def test_more_bytes_are_never_sooner_there_and_faster_links_never_hurt(
    kind: str, sent: float, more: float, group: tuple[int, int, int], faster: float
) -> None:
    first, count, stride = group
    ranks = range(first, first + count * stride, stride)
    usual = taken(kind, sent, ranks)
    assert taken(kind, sent * more, ranks) >= usual
    assert taken(kind, sent, ranks, near=NEAR * faster) <= usual
    assert taken(kind, sent, ranks, far=FAR * faster) <= usual
    assert taken(kind, sent, tuple(ranks)) == usual

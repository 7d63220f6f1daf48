"""What a process sends in a step is what the formulas say, collective by collective: calls and bytes."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from liaoyuan.models import config_from_dict
from liaoyuan.models.experts import Router
from liaoyuan.parallel import Layout, Sent, Shape, Traffic, World, closed_form, lay_out, record_traffic, resolve
from tests.conftest import slow_if
from tests.parallel.layouts import LENGTH, MODELS, batches_of, model_of, rows_of
from tests.parallel.processes import run
from tests.parallel.test_layouts import axes

DENSE = {
    "fsdp 2": axes(2),
    "fsdp 4, 2 microbatches": axes(4, 2),
    "hsdp 2 x 2": axes(4, dp=2),
    "replicas 2": axes(2, dp=2),
    "tp 2": axes(2, tp=2),
    "ulysses 2": axes(2, 2, ulysses=2),
    "ring 2": axes(2, 2, ring=2),
    "ring 3, shards padded": axes(3, 2, ring=3),
    "ring 4": axes(4, 2, ring=4),
    "hybrid 2 x 2, recomputed": axes(4, 2, ulysses=2, ring=2, recompute="full"),
    "1f1b": axes(2, 4, pp=2),
    "interleaved": axes(2, 4, pp=2, schedule="interleaved"),
    "zbv": axes(2, 4, pp=2, schedule="zbv"),
    "fsdp 2 x tp 2": axes(4, tp=2),
    "tp 2, every other layer recomputed": axes(2, tp=2, recompute="selective", recompute_every=2),
    "pp 2 x fsdp 2 x tp 2": axes(8, 4, pp=2, tp=2),
}
EXPERTS = {
    "fsdp 2": axes(2),
    "tp 2": axes(2, tp=2),
    "ep 2": axes(2, ep=2),
    "ep 2 of fsdp 4": axes(4, 2, ep=2),
    "ep 2 of ulysses 2": axes(2, 2, ulysses=2, ep=2),
    "ep 4 of fsdp 2 x tp 2, recomputed": axes(4, tp=2, ep=4, recompute="full"),
}
EXPERT_ROWS = "ep", "all-to-all"
UNEVEN = 0.15  # how far random routers are from an even load


def traffic_of_a_step(
    world: World,
    kind: str,
    dtype: torch.dtype,
    layout: Layout,
    microbatches: int,
    plant: Callable[[], None],
    overlap: bool = False,
) -> tuple[Traffic, Traffic]:
    """Return what this process sent in the second step, and what the formulas say."""
    plant()
    layout = layout.model_copy(update={"overlap": overlap})
    config = config_from_dict(MODELS[kind])
    rows = rows_of(layout, microbatches, world.size)
    layout = resolve(layout, world.size, Shape(config, LENGTH, rows, microbatches))
    world = world.arrange(layout)
    program = lay_out(model_of(kind, dtype), layout, world)
    batches = batches_of(config, microbatches, world.data_rank, world.data_size, rows)

    def take() -> None:
        for _, weight in program.named_parameters():
            weight.grad = None

    program.backward(batches, 1.0, take)  # a pipeline's neighbours greet each other
    take()
    with record_traffic(world.mesh) as traffic:
        program.backward(batches, 1.0, take)
    assert world.mesh
    tokens = len(batches[0].tokens)
    return traffic, closed_form(layout, config, tokens, microbatches, dtype.itemsize, world.mesh.place("pp"))


def even_routers() -> None:
    """Let tokens choose experts in turn."""

    right = Router._logits

    def logits(router: Router, x: Tensor) -> Tensor:
        count, chosen = router.experts.num_experts, router.experts.num_experts_per_tok
        turn = torch.arange(len(x) * chosen).view(-1, chosen) % count
        return right(router, x) + 100 * (2 * torch.nn.functional.one_hot(turn, count).sum(1) - 1)

    Router._logits = logits  # type: ignore[method-assign]


SHOWN = ("fsdp 2", "tp 2", "ulysses 2", "ring 2", "1f1b", "fsdp 2 x tp 2")  # by rows with more processes or more axes


@pytest.mark.parametrize("name", [slow_if(name in SHOWN, name) for name in DENSE])
def test_a_process_sends_what_the_formula_says(name: str) -> None:
    size, microbatches, layout = DENSE[name]
    for measured, expected in run(size, traffic_of_a_step, "dense", torch.bfloat16, layout, microbatches, lambda: None):
        assert measured == expected and sum(sent.bytes for sent in measured.values()) > 0


@pytest.mark.parametrize("name", ["ring 2", "fsdp 2 x tp 2", *(slow_if(True, name) for name in ("fsdp 2", "tp 2"))])
def test_overlap_cuts_transfers_into_chunks_of_the_same_bytes(name: str) -> None:
    size, microbatches, layout = DENSE[name]
    arguments = ("dense", torch.bfloat16, layout, microbatches, lambda: None, True)
    for measured, expected in run(size, traffic_of_a_step, *arguments):
        assert {key: sent.bytes for key, sent in measured.items()} == {key: s.bytes for key, s in expected.items()}


@pytest.mark.parametrize(
    "layout", [slow_if(True, Layout(fsdp=2), name="fsdp"), slow_if(False, Layout(pp=2, fsdp=2), name="pp x fsdp")]
)
def test_evaluation_leaves_no_weight_whole(layout: Layout) -> None:
    for parts in run(layout.pp * 2, _parts_after_evaluation, layout):
        assert parts and all(parts)


def _parts_after_evaluation(world: World, layout: Layout) -> list[bool]:
    world = world.arrange(layout)
    program = lay_out(model_of("dense", torch.float32), layout, world).eval()
    program.loss(batches_of(program.config, 4, world.data_rank, world.data_size)[0])
    return [isinstance(weight, DTensor) for _, weight in program.named_parameters()]


@pytest.mark.parametrize(
    "kind", ["latent", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("experts", "sinks"))]
)
@pytest.mark.parametrize("name", [slow_if(name in ("fsdp 2", "tp 2", "ep 2"), name) for name in EXPERTS])
def test_with_experts_too_where_routers_are_even(kind: str, name: str) -> None:
    size, microbatches, layout = EXPERTS[name]
    for measured, expected in run(size, traffic_of_a_step, kind, torch.float32, layout, microbatches, even_routers):
        assert measured == expected


def test_rows_of_experts_are_as_uneven_as_the_router() -> None:
    found = run(4, traffic_of_a_step, "experts", torch.float32, Layout(fsdp=4, ep=4), 1, lambda: None)
    for measured, expected in found:
        rows, even = measured.pop(EXPERT_ROWS), expected.pop(EXPERT_ROWS)
        assert measured == expected
        assert rows.calls == even.calls and abs(rows.bytes / even.bytes - 1) < UNEVEN


@pytest.mark.parametrize("name", ["ulysses 2", "tp 2", slow_if(True, "fsdp 2")])
def test_latent_attention_and_tied_tables_too(name: str) -> None:
    size, microbatches, layout = DENSE[name]
    for kind in ("latent", "tied"):
        for measured, expected in run(size, traffic_of_a_step, kind, torch.float32, layout, microbatches, lambda: None):
            assert measured == expected, kind


def test_bytes_of_each_collective() -> None:
    """By hand, of 3 processes: what the convention says."""
    found = run(3, _each_collective)
    for rank, traffic in enumerate(found):
        assert traffic["world", "all-gather"] == Sent(1, 2 * 12 * 4)  # its 12 numbers, to two others
        assert traffic["world", "reduce-scatter"] == Sent(1, 8 * 4)  # all but its own 4 of 12
        assert traffic["world", "all-reduce"] == Sent(1, 2 * 8 * 4)
        assert traffic["world", "all-to-all"] == Sent(1, (6 - 2 * rank) * 8)  # 0, 2 and 4 rows, less its own
        assert traffic["world", "broadcast"] == Sent(1, 12 * 4 if rank == 1 else 0)
        assert traffic.get(("world", "send"), Sent()) == (Sent(1, 12 * 4) if rank == 0 else Sent())


def _each_collective(world: World) -> Traffic:
    x = torch.zeros(12)
    with record_traffic(None) as traffic:
        dist.all_gather_single(torch.zeros(36), x)
        dist.reduce_scatter_single(torch.zeros(4), x)
        dist.all_reduce(x)
        sent, received = [0, 2, 4], [2 * world.rank] * 3
        dist.all_to_all_single(torch.zeros(sum(received), 2), torch.zeros(6, 2), received, sent)
        dist.broadcast(x, 1)
        if world.rank < 2:
            dist.send(x, 1) if world.rank == 0 else dist.recv(x, 0)
    return dict(traffic)


def test_sums_over_everybody_are_of_no_axis() -> None:
    for traffic in run(4, _sum):
        assert traffic == {("world", "all-reduce"): Sent(1, 2 * 8 * 3 // 4)}


def _sum(world: World) -> Traffic:
    world = world.arrange(Layout(fsdp=2, tp=2))
    with record_traffic(world.mesh) as traffic:
        world.sum_numbers(1.0)
    return dict(traffic)

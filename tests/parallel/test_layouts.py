"""Every layout gives the loss and the gradients of one process. In fp64, on gloo processes and on simulated ranks."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from liaoyuan.ops import Penalties
from liaoyuan.parallel import Layout, World, lay_out
from liaoyuan.parallel.layout import Schedule
from liaoyuan.parallel.simulated import simulate
from tests.conftest import slow_if
from tests.parallel.faults import FAULTS
from tests.parallel.layouts import Outcome, batches_of, model_of, rows_of, step
from tests.parallel.processes import run

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-10, 1e-9  # relative, fp64


def axes(processes: int, microbatches: int = 1, **layout: object) -> tuple[int, int, Layout]:
    """Return a row of the table: processes, microbatches, layout (`ulysses` and `ring` are those of cp)."""
    cp = {name: layout.pop(name) for name in ("ulysses", "ring") if name in layout}
    return processes, microbatches, Layout.model_validate({**layout, "cp": cp})


ROWS = {
    "fsdp 2": axes(2),
    "fsdp 4, 2 microbatches": axes(4, 2),
    "hsdp 2 x 2": axes(4, dp=2),
    "tp 2": axes(2, tp=2),
    "tp 4": axes(4, tp=4),
    "tp 2, exact": axes(4, tp=2, exact=True),
    "gpipe": axes(2, 4, pp=2, schedule="gpipe"),
    "1f1b": axes(2, 4, pp=2),
    "1f1b 4": axes(4, 4, pp=4),
    "interleaved": axes(2, 4, pp=2, schedule="interleaved"),
    "zbv": axes(2, 4, pp=2, schedule="zbv"),
    "dualpipev": axes(2, 4, pp=2, schedule="dualpipev"),
    "ulysses 2": axes(2, 2, ulysses=2),
    "ulysses 8, fewer key heads": axes(8, 2, ulysses=8),
    "ring 2": axes(2, 2, ring=2),
    "ring 4": axes(4, 2, ring=4),
    "hybrid 2 x 2": axes(4, 2, ulysses=2, ring=2),
    "hybrid 2 x 4": axes(8, 2, ulysses=2, ring=4),
    "recompute fully": axes(2, recompute="full"),
    "recompute every other, selectively": axes(2, tp=2, recompute="selective", recompute_every=2),
    "nothing overlaps": axes(8, 2, ring=2, tp=2, overlap=False),
    "fsdp 2 x tp 2": axes(4, tp=2),
    "dp 2 x fsdp 2 x tp 2": axes(8, dp=2, tp=2),
    "fsdp 2 x ring 2 x tp 2": axes(8, 2, ring=2, tp=2),
    "fsdp 2 x ulysses 2 x tp 2": axes(8, 2, ulysses=2, tp=2),
    "pp 2 x fsdp 2 x tp 2": axes(8, 2, pp=2, tp=2),
    "zbv 2 x fsdp 2 x tp 2": axes(8, 4, pp=2, tp=2, schedule="zbv"),
    "pp 2 x ring 2 x ulysses 2": axes(8, 4, pp=2, ring=2, ulysses=2),
    "ring 2 x tp 4, recomputed": axes(8, 2, ring=2, tp=4, recompute="full"),
    "dualpipev 2 x ulysses 2 x fsdp 2": axes(8, 4, pp=2, ulysses=2, schedule="dualpipev"),
}
EXPERT_ROWS = {
    "fsdp 2": axes(2),
    "tp 2": axes(2, tp=2),
    "ep 2": axes(2, ep=2),
    "ep 4": axes(4, ep=4),
    "nothing overlaps": axes(4, tp=2, ep=4, overlap=False),
    "ep 2 of fsdp 4": axes(4, 2, ep=2),
    "ep 2, dp 2": axes(4, dp=2, ep=2),
    "ep 2 of tp 2": axes(2, tp=2, ep=2),
    "ep 2 of tp 4, exact": axes(4, tp=4, ep=2, exact=True),
    "ep 2 of ring 2": axes(2, 2, ring=2, ep=2),
    "ring 2 x ulysses 2": axes(4, 2, ring=2, ulysses=2),
    "1f1b": axes(2, 4, pp=2),
    "ep 4 of fsdp 2 x tp 2, recomputed": axes(4, tp=2, ep=4, recompute="full"),
    "ep 2, selectively recomputed": axes(2, ep=2, recompute="selective"),
    "ep 2, pp 2 x fsdp 2 x tp 2": axes(8, 2, pp=2, tp=2, ep=2),
    "ep 4, zbv 2 x fsdp 2 x ulysses 2": axes(8, 4, pp=2, ulysses=2, ep=4, schedule="zbv"),
    "ep 8 of fsdp 2 x ring 2 x tp 2": axes(8, 2, ring=2, tp=2, ep=8),
}
TIED_ROWS = (
    *("fsdp 2", "tp 4", "tp 2, exact", "fsdp 2 x ring 2 x tp 2"),
    *("1f1b 4", "interleaved", "dualpipev", "pp 2 x fsdp 2 x tp 2", "zbv 2 x fsdp 2 x tp 2"),  # ends far and near
)
TABLE = {
    **{("dense", name): row for name, row in ROWS.items()},
    **{("tied", name): ROWS[name] for name in TIED_ROWS},
    **{(kind, name): row for kind in ("experts", "latent") for name, row in EXPERT_ROWS.items()},
    **{
        ("sinks", name): EXPERT_ROWS[name]
        for name in ("tp 2", "ep 2", "ring 2 x ulysses 2", "ep 8 of fsdp 2 x ring 2 x tp 2")
    },
}
LARGE = {  # more axes at once, on simulated ranks
    ("dense", "pp 2 x dp 2 x fsdp 2 x tp 2"): axes(16, 2, pp=2, dp=2, tp=2),
    ("tied", "zbv 2 x dp 2 x ring 2 x ulysses 2 x tp 2"): axes(
        32, 4, pp=2, dp=2, ring=2, ulysses=2, tp=2, schedule="zbv"
    ),
    ("experts", "pp 2 x fsdp 2 x ring 2 x tp 2, ep 4"): axes(16, 4, pp=2, ring=2, tp=2, ep=4),
    ("latent", "dualpipev 2 x dp 2 x ring 2 x ulysses 2 x tp 2, ep 8"): axes(
        32, 4, pp=2, dp=2, ring=2, ulysses=2, tp=2, ep=8, schedule="dualpipev"
    ),
    ("sinks", "dp 2 x ring 2 x ulysses 2 x tp 2, ep 4"): axes(16, 2, dp=2, ring=2, ulysses=2, tp=2, ep=4),
}
Ranks = Callable[..., list[Outcome]]


@functools.cache
def of_one_process(kind: str, rows: int, penalties: Penalties | None = None) -> Outcome:
    return step(World(), kind, torch.float64, Layout(), 1, penalties=penalties, rows=rows)


def differences(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Return the relative difference of the loss, and the largest one of any weight's gradient."""
    worst = 0.0
    for name, reference in expected.gradients.items():
        if reference.any():
            worst = max(worst, float((found.gradients[name] - reference).norm() / reference.norm()))
    return abs(found.loss - expected.loss) / abs(expected.loss), worst


QUICK_ON_PROCESSES = {  # each axis, each schedule and each way to share experts once, mixed where that is cheap
    "dense": (
        *("fsdp 4, 2 microbatches", "hsdp 2 x 2", "tp 2, exact", "ring 4", "hybrid 2 x 2"),
        *("gpipe", "1f1b 4", "interleaved", "zbv", "dualpipev", "recompute every other, selectively"),
    ),
    "tied": ("tp 4",),
    "experts": ("ep 2 of fsdp 4", "ep 2 of tp 4, exact", "ep 4 of fsdp 2 x tp 2, recomputed"),
    "latent": ("ep 8 of fsdp 2 x ring 2 x tp 2",),
    "sinks": ("ring 2 x ulysses 2",),
}


def on_processes() -> list[Any]:
    """Return the rows for gloo processes; most are slow, since simulated ranks show the same in a third of the time."""
    return [
        slow_if(name not in QUICK_ON_PROCESSES[kind], run, kind, name, name=f"{kind}: {name}-gloo")
        for kind, name in TABLE
    ]


def on_simulated_ranks() -> list[Any]:
    """Return all rows for simulated ranks; slow are those that are quick on processes, those of eight whose mixture
    another model or more ranks have, and those of the latent model that the other one with experts shows.
    """
    twice = {
        *(("dense", "hybrid 2 x 4"), ("dense", "fsdp 2 x ulysses 2 x tp 2"), ("tied", "fsdp 2 x ring 2 x tp 2")),
        *(("dense", name) for name in ("zbv 2 x fsdp 2 x tp 2", "fsdp 2 x ring 2 x tp 2", "ring 2 x tp 4, recomputed")),
        *((kind, "pp 2 x fsdp 2 x tp 2") for kind in ("dense", "tied")),
        *(("dense", "nothing overlaps"), ("experts", "ep 2, pp 2 x fsdp 2 x tp 2")),
        *(("latent", name) for name in ("fsdp 2", "tp 2", "ep 2", "ep 4", "ep 2 of fsdp 4")),
        *((kind, "ep 8 of fsdp 2 x ring 2 x tp 2") for kind in ("experts", "latent", "sinks")),
        *(("latent", name) for name in ("ep 2, pp 2 x fsdp 2 x tp 2", "ep 4, zbv 2 x fsdp 2 x ulysses 2")),
    }
    return [
        slow_if(
            name in QUICK_ON_PROCESSES[kind] or (kind, name) in twice, simulate, kind, name,
            name=f"{kind}: {name}-simulated",
        )
        for kind, name in TABLE
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "kind", "name"),
    [*on_processes(), *on_simulated_ranks()],
)
def test_a_layout_gives_the_loss_and_gradients_of_one_process(
    ranks: Ranks, kind: str, name: str, record_property
) -> None:
    _compare(kind, TABLE[kind, name], ranks, record_property)


@pytest.mark.parametrize(
    ("kind", "name"),
    [slow_if(row[0] != "experts", *row, name=f"{row[0]}: {row[1]}") for row in LARGE],
)
def test_worlds_too_large_for_processes(kind: str, name: str, record_property) -> None:
    _compare(kind, LARGE[kind, name], simulate, record_property)


def _compare(
    kind: str,
    case: tuple[int, int, Layout],
    ranks: Ranks,
    record_property: Callable[[str, object], None],
    penalties: Penalties | None = None,
) -> None:
    size, microbatches, layout = case
    expected = of_one_process(kind, rows_of(layout, microbatches, size), penalties)
    assert penalties is None or expected.penalty > 0.1
    for found in ranks(size, step, kind, torch.float64, layout, microbatches, _nothing, penalties):
        assert found.gradients.keys() == expected.gradients.keys()
        assert all(torch.equal(found.loads[router], load) for router, load in expected.loads.items())
        loss, gradient = differences(found, expected)
        assert loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE, (loss, gradient)
        assert found.penalty == pytest.approx(expected.penalty, rel=LOSS_TOLERANCE)
        record_property("loss", loss)
        record_property("gradient", gradient)


@pytest.mark.parametrize(
    "name",
    [
        *("tp 2, exact", "fsdp 4, 2 microbatches", "1f1b 4", "fsdp 2 x ring 2 x tp 2"),
        *(slow_if(True, name) for name in ("tp 4", "zbv 2 x fsdp 2 x tp 2")),
    ],
)
def test_a_loss_with_z_loss_and_label_smoothing_is_that_of_one_process(name: str, record_property) -> None:
    _compare("dense", TABLE["dense", name], simulate, record_property, Penalties(z_loss=0.01, label_smoothing=0.1))


def _nothing() -> None:
    pass


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_bug_shows(name: str) -> None:
    kind, row, plant = FAULTS[name]
    size, microbatches, layout = TABLE[kind, row]
    found = run(size, step, kind, torch.float64, layout, microbatches, plant)[0]
    loss, gradient = differences(found, of_one_process(kind, rows_of(layout, microbatches, size)))
    assert loss > LOSS_TOLERANCE or gradient > 1e-3, (loss, gradient)


QUICK_IN_LOWER_PRECISION = (  # the rows with the most axes
    ("dense", torch.float32, "ring 2 x ulysses 2"),
    ("latent", torch.bfloat16, "ep 2, pp 2 x fsdp 2 x tp 2"),
)


@pytest.mark.parametrize(
    ("kind", "dtype", "name"),
    [
        slow_if(row not in QUICK_IN_LOWER_PRECISION, *row)
        for row in itertools.product(
            ("dense", "latent"),
            (torch.float32, torch.bfloat16),
            ("fsdp 2", "tp 2", "ring 2 x ulysses 2", "1f1b", "ep 2, pp 2 x fsdp 2 x tp 2"),
        )
    ],
    ids=str,
)
def test_in_lower_precision_too(kind: str, dtype: torch.dtype, name: str) -> None:
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    size, microbatches, layout = EXPERT_ROWS[name]
    expected = step(World(), kind, dtype, Layout(), 1, rows=rows_of(layout, microbatches, size))
    layout = layout.model_copy(update={"ep": 1} if kind == "dense" else {})
    found = run(size, step, kind, dtype, layout, microbatches)[0]
    assert abs(found.loss - expected.loss) / expected.loss < tolerance
    if dtype is torch.float32:
        assert differences(found, expected)[1] < tolerance


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_a_pipeline_evaluates_before_and_after_it_learns(schedule: Schedule) -> None:
    (expected, _) = _losses(World(), Layout())
    for losses in simulate(2, _losses, Layout(pp=2, fsdp=1, schedule=schedule)):
        assert losses == pytest.approx([expected] * 2, rel=LOSS_TOLERANCE)


def _losses(world: World, layout: Layout) -> list[float]:
    """Return the loss of a batch as evaluation gives it, before gradients are computed and after."""
    world = world.arrange(layout)
    program = lay_out(model_of("tied", torch.float64), layout, world)
    batches = batches_of(program.config, 4, world.data_rank, world.data_size)
    losses = []
    for _ in range(2):
        losses.append(world.sum_numbers(float(program.loss(batches[0])))[0])
        program.backward(batches, 1.0)
        with pytest.raises(ValueError, match="gradients of an earlier pass"):
            program.backward(batches, 1.0)
        for _, weight in program.named_parameters():
            weight.grad = None
    return losses


@pytest.mark.parametrize("rows", sorted({rows_of(layout, many, size) for size, many, layout in TABLE.values()}))
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in TABLE}))
def test_no_gradient_of_the_reference_is_zero(kind: str, rows: int, record_property) -> None:
    gradients = of_one_process(kind, rows).gradients
    norms = {name: float(x.norm()) for name, x in gradients.items() if "correction" not in name}
    least = min(norms, key=norms.__getitem__)
    print(f"{kind}: the smallest gradient is that of {least}, {norms[least]:.1e}")
    record_property(kind, norms[least])
    assert norms[least] > 1e-6, (kind, least, norms[least])

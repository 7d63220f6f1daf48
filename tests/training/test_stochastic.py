"""Weights held in bf16 alone train as with fp32 masters, where rounding to nearest stalls; however they are cut."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, initialise, with_dtype
from liaoyuan.rundir import read_metrics
from liaoyuan.training import AdamW, TrainConfig, make_optimiser
from liaoyuan.training import stochastic as room
from tests.training.test_loop import CONFIG, trained
from tests.training.test_optimiser import put_gradients

BF16 = torch.bfloat16


def losses(dtype: torch.dtype, update: str, steps: int) -> list[float]:
    """Fit 512 weights near 1 to targets half a percent away, in steps far below the last place of bf16."""
    generator = torch.Generator().manual_seed(0)
    target = 1 + 0.05 * torch.rand(64, 8, generator=generator)
    weight = nn.Parameter(torch.ones(64, 8, dtype=dtype))
    rounded = AdamW([("w", weight)], weight_decay=0.0, master_dtype=BF16 if update == "by chance" else torch.float32)
    plain = torch.optim.AdamW([weight], lr=2e-4, weight_decay=0.0)
    found = []
    for _ in range(steps):
        loss = (weight.float() - target).square().mean()
        loss.backward()
        found.append(float(loss.detach()))
        if update == "to nearest":
            plain.step()
            plain.zero_grad()
        else:
            rounded.step(2e-4)
    return found


def test_rounding_by_chance_goes_on_where_rounding_to_nearest_stalls() -> None:
    masters = losses(torch.float32, "masters", 300)
    by_chance = losses(BF16, "by chance", 300)
    to_nearest = losses(BF16, "to nearest", 300)
    place = 2.0**-7  # of bf16 just above 1: rounded by chance, a weight is off by a place now and then
    assert masters[-1] < 0.05 * masters[0]
    assert by_chance[-1] < min(masters[-1] + place**2, 0.1 * by_chance[0])
    assert to_nearest[-1] > 0.95 * to_nearest[0]


def test_a_decoder_learns_as_fast_as_with_masters(tiny_config: ModelConfig, tmp_path: Path) -> None:
    config, settings = with_dtype(tiny_config, BF16), CONFIG.model_copy(update={"steps": 40})
    rows = {}
    for dtype in ("float32", "bfloat16"):
        trained(config, tmp_path / dtype, settings.model_copy(update={"master_dtype": dtype}))
        rows[dtype] = [row["loss"] for row in read_metrics(tmp_path / dtype / "metrics.jsonl")]
    masters, held_loss = rows["float32"], rows["bfloat16"]
    assert masters != held_loss
    assert masters[0] - masters[-1] > 0.1
    assert abs(held_loss[-1] - masters[-1]) < 0.05 * (masters[0] - masters[-1])


def held(config: ModelConfig, seed: int = 0) -> tuple[Decoder, AdamW]:
    model = initialise(Decoder(with_dtype(config, BF16)), 0)
    return model, AdamW(model.named_parameters(), master_dtype=BF16, seed=seed)


def test_no_masters_are_kept_and_moments_are_fp32(tiny_config: ModelConfig) -> None:
    model, optimiser = held(tiny_config)
    names = {name.rpartition(".")[2] for name in optimiser.state()}
    assert names == {"step", "exp_avg", "exp_avg_sq"}
    kept = sum(x.nbytes for x in optimiser.state().values() if x.ndim)
    assert kept == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert all(x.dtype is torch.float32 for x in optimiser.state().values())


def test_another_seed_rounds_otherwise_and_the_same_seed_alike(tiny_config: ModelConfig) -> None:
    found = []
    for seed in (0, 0, 1):
        model, optimiser = held(tiny_config, seed)
        for step in range(3):
            put_gradients(model, step)
            optimiser.step(1e-4)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert 0.001 < (found[0] != found[2]).float().mean() < 0.9


@pytest.mark.parametrize(
    "blocks",
    [
        [((0, 0, 0), (2, 4, 6)), ((2, 0, 0), (2, 4, 6))],
        [((0, 0, 0), (4, 1, 6)), ((0, 1, 0), (4, 3, 6))],
        [((0, 0, 0), (4, 4, 5)), ((0, 0, 5), (4, 4, 1))],
        [((0, 0, 0), (1, 2, 6)), ((0, 2, 0), (1, 2, 6)), ((1, 0, 0), (3, 4, 2)), ((1, 0, 2), (3, 4, 4))],
    ],
    ids=["experts", "rows", "columns", "both"],
)
def test_any_cut_of_a_weight_is_rounded_like_the_whole(
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(2)).to(BF16)
    slopes = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(3))

    def trained(starts: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        cut = tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))
        part = whole[cut].clone()
        monkeypatch.setattr(room, "own_block", lambda _: (starts, shape))
        monkeypatch.setattr("liaoyuan.training.weights.local", lambda _: part)
        optimiser = AdamW([("experts", nn.Parameter(whole.clone()))], master_dtype=BF16)
        for slope in slopes:
            optimiser.weights[0].master.grad = slope[cut].contiguous()
            optimiser.update(1e-3)
        return part

    expected = trained((0, 0, 0), (4, 4, 6))
    assert not torch.equal(expected, whole)
    for starts, shape in blocks:
        cut = tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))
        assert torch.equal(trained(starts, shape), expected[cut])


@pytest.mark.parametrize(
    ("dtype", "optimiser", "said"),
    [(torch.float32, "adamw", "set model.dtype = 'bfloat16' too"), (BF16, "muon", "Muon keeps fp32 masters")],
)
def test_what_cannot_be_held_in_bf16_is_refused(
    dtype: torch.dtype, optimiser: str, said: str, tiny_config: ModelConfig
) -> None:
    settings = TrainConfig(steps=1, optimiser=optimiser, master_dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(LiaoyuanError, match=said):
        make_optimiser(initialise(Decoder(with_dtype(tiny_config, dtype)), 0), settings)

"""The optimisers against torch's own and against their definitions."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, initialise, with_dtype
from liaoyuan.ops import newton_schulz
from liaoyuan.training.muon import Muon
from liaoyuan.training.optimiser import AdamW


def put_gradients(model: Decoder, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def is_spared(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 or "embed_tokens" in name


def test_adamw_is_torchs_adamw_with_clipping_and_spared_norms_and_tables(tiny_config: ModelConfig) -> None:
    ours, theirs = initialise(Decoder(tiny_config), 0), initialise(Decoder(tiny_config), 0)
    optimiser = AdamW(ours.named_parameters(), weight_decay=0.3)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if not is_spared(n, p)], "weight_decay": 0.3},
        {"params": [p for n, p in theirs.named_parameters() if is_spared(n, p)], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(5):
        rate = 0.01 * (step + 1)
        put_gradients(ours, step)
        put_gradients(theirs, step)
        norm = optimiser.step(rate, clip=1.0)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in oracle.param_groups:
            group["lr"] = rate
        oracle.step()
        assert norm == pytest.approx(float(expected), rel=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_bf16_weight_is_the_rounded_copy_of_a_master_that_takes_small_steps(
    kind: type[AdamW] | type[Muon], tiny_config: ModelConfig
) -> None:
    model = initialise(Decoder(with_dtype(tiny_config, torch.bfloat16)), 0)
    wide = Decoder(tiny_config)
    wide.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    optimisers = [kind(x.named_parameters()) for x in (model, wide)]
    for step in range(20):
        put_gradients(model, step)
        for parameter, other in zip(model.parameters(), wide.parameters(), strict=True):
            assert parameter.grad is not None
            other.grad = parameter.grad.float()
        for optimiser in optimisers:
            optimiser.step(1e-5)  # far below what bf16 can add to a weight
    for narrow, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, other.bfloat16())


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_microbatches_are_gathered_in_fp32(kind: type[AdamW] | type[Muon], tiny_config: ModelConfig) -> None:
    model = initialise(Decoder(with_dtype(tiny_config, torch.bfloat16)), 0)
    optimiser = kind(model.named_parameters())
    for value in (1.0, *[2.0**-9] * 4):  # each of the small ones would vanish in a bf16 sum
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimiser.accumulate()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert optimiser.step(0.0) == pytest.approx((1 + 4 * 2.0**-9) * count**0.5, rel=1e-6)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: type[AdamW] | type[Muon], tiny_model: Decoder) -> None:
    optimiser = kind(tiny_model.named_parameters())
    put_gradients(tiny_model, 0)
    optimiser.step(0.01)
    before = snapshot(tiny_model, optimiser)
    put_gradients(tiny_model, 1)
    next(tiny_model.parameters()).grad[0] = float("nan")  # type: ignore[index]
    assert not optimiser.step(0.01) < float("inf")
    for was, now in zip(before, snapshot(tiny_model, optimiser), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_loaded_state_goes_on_bit_for_bit(
    kind: type[AdamW] | type[Muon], dtype: torch.dtype, tiny_config: ModelConfig
) -> None:
    config = with_dtype(tiny_config, dtype)
    first, second = initialise(Decoder(config), 0), Decoder(config)
    optimiser = kind(first.named_parameters())
    for step in range(3):
        put_gradients(first, step)
        optimiser.step(0.01)
    second.load_state_dict({name: x.clone() for name, x in first.state_dict().items()})
    other = kind(second.named_parameters())
    other.load({name: x.clone() for name, x in optimiser.state().items()})
    for model, resumed in ((first, optimiser), (second, other)):
        put_gradients(model, 3)
        resumed.step(0.01)
    for one, two in zip(snapshot(first, optimiser), snapshot(second, other), strict=True):
        assert torch.equal(one, two)


def test_a_state_that_lacks_a_tensor_is_refused(tiny_model: Decoder) -> None:
    optimiser = AdamW(tiny_model.named_parameters())
    put_gradients(tiny_model, 0)
    optimiser.step(0.01)
    state = dict(optimiser.state())
    del state["norm.weight.exp_avg"]
    with pytest.raises(LiaoyuanError, match=r"norm\.weight\.exp_avg"):
        optimiser.load(state)


@pytest.mark.parametrize("shape", [(3, 24, 64), (64, 24), (32, 32)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ newton_schulz(matrices) @ v.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inside - torch.diag_embed(values)).abs().max() < 0.1


def test_muon_orthogonalises_gate_and_up_apart(tiny_model: Decoder) -> None:
    before = tiny_model.layers[0].mlp.gate_up_proj.weight.detach().clone()
    optimiser = Muon(tiny_model.named_parameters(), weight_decay=0.0)
    put_gradients(tiny_model, 0)
    gradient = tiny_model.layers[0].mlp.gate_up_proj.weight.grad.clone()
    optimiser.step(1.0, clip=1e9)
    change = before - tiny_model.layers[0].mlp.gate_up_proj.weight.detach()
    scale = 0.2 * max(gradient[0::2].shape) ** 0.5
    for part in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(change[part], newton_schulz(gradient[part]) * scale, rtol=0.05, atol=0.02)


def snapshot(model: Decoder, optimiser: AdamW | Muon) -> Iterator[torch.Tensor]:
    return iter([x.detach().clone() for x in (*model.parameters(), *optimiser.state().values())])

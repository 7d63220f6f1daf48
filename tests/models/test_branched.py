"""Documents that begin alike are computed once where they do, with the bits and gradients of whole documents."""

from typing import Any

import pytest
import torch
from torch import Tensor

from liaoyuan.models import Decoder, ModelConfig, branched_context, initialise, packed_context
from liaoyuan.models.config import Latent

GROUPS = [(5, [3, 1, 4]), (1, [2]), (4, [6, 0, 6])]  # lengths of the beginning, and of what follows it
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows and sinks": {"sliding_window": 4, "full_layers": (1,), "attention_sinks": True},
    "latent": {
        "latent": Latent(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
    },
}


def documents() -> tuple[Tensor, list[Tensor]]:
    """Return the rows of the groups, and whole documents."""
    rows, wholes = [], []
    for begin, ends in GROUPS:
        shared = torch.randint(0, 90, (begin,))
        own = [torch.randint(0, 90, (end,)) for end in ends]
        rows += [shared, *own]
        wholes += [torch.cat([shared, end]) for end in own]
    return torch.cat(rows), wholes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shared_beginnings_change_no_bit(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = ModelConfig("qwen3", 90, 32, 48, 2, 4, 2, 16, **FORMS[form])
    model = initialise(Decoder(config), 0).to(dtype)
    tokens, wholes = documents()
    positions, context = branched_context(GROUPS)
    places, packed = packed_context([len(one) for one in wholes])
    alone = model(torch.cat(wholes), places, packed)
    shared = model(tokens, positions, context)
    assert torch.equal(shared.index_select(0, context.row_of), alone)


def test_gradients_are_those_of_whole_documents() -> None:
    torch.manual_seed(0)
    model = initialise(Decoder(ModelConfig("qwen3", 90, 32, 48, 2, 4, 2, 16, qk_norm=True)), 0)
    tokens, wholes = documents()
    positions, context = branched_context(GROUPS)
    places, packed = packed_context([len(one) for one in wholes])
    targets, weights = torch.randint(0, 90, places.shape), torch.randn(places.shape)
    found = []
    for score in (
        lambda: model(torch.cat(wholes), places, packed, targets=targets),
        lambda: model(tokens, positions, context, targets=targets, rows=context.row_of),
    ):
        model.zero_grad()
        (score() * weights).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)

"""The FLOP count against torch's own counter, which sees the products that really run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from liaoyuan.models import Decoder, ModelConfig, packed_context
from liaoyuan.training.flops import average_context, training_flops, utilisation


def test_a_forward_pass_has_the_flops_that_torch_counts(tiny_config: ModelConfig, tiny_model: Decoder) -> None:
    length = 64
    positions, context = packed_context([length])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_model(torch.zeros(length, dtype=torch.int64), positions, context)
    norms = 2 * (tiny_config.num_hidden_layers * (2 * 32 + 2 * 16) + 32)  # weights that are no products
    linear = length * (tiny_config.flops_per_token(0) - norms)
    attention = length * (tiny_config.flops_per_token(length) - tiny_config.flops_per_token(0))
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for name, flops in counted.items() if "attention" not in str(name))
    assert products in (linear, linear + attention)  # some attention kernels are counted as products


def test_a_token_attends_to_itself_and_what_precedes_it_in_its_document() -> None:
    boundaries = torch.tensor([0, 4, 6, 6, 6], dtype=torch.int32)
    assert average_context(boundaries) == pytest.approx((1 + 2 + 3 + 4 + 1 + 2) / 6)


def test_training_costs_three_forward_passes(tiny_config: ModelConfig) -> None:
    boundaries = torch.tensor([0, 4, 6, 6, 6], dtype=torch.int32)
    forward = 6 * tiny_config.flops_per_token(13 / 6)
    assert training_flops(tiny_config, boundaries) == pytest.approx(3 * forward)
    assert utilisation(6.0, tiny_config, 6 * forward, context=13 / 6) == pytest.approx(0.5)

"""Activation checkpointing: activations that the backward pass computes again instead of keeping them (Chen et al.
2016, arXiv 1604.06174). Selective keeps what is expensive, matrix products and attention (arXiv 2205.05198, sec. 5).
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from liaoyuan.models import Decoder
from liaoyuan.parallel.layout import Layout

aten, ours = torch.ops.aten, torch.ops.liaoyuan
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
    ours.linear.default,
    ours.attention.default,
}


def apply_recompute(model: Decoder, layout: Layout) -> None:
    """Let every `layout.recompute_every`-th layer of a stage compute its activations again, in place."""
    if layout.recompute == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if layout.recompute == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for number, layer in enumerate(model.layers):
        if number % layout.recompute_every == 0:
            layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE

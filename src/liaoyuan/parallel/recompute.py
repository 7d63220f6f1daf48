"""Activation checkpointing: activations that the backward pass computes again instead of keeping them (Chen et al.
2016, arXiv 1604.06174). Selective keeps what is expensive, matrix products and attention (arXiv 2205.05198, sec. 5).
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from liaoyuan.models import Decoder
from liaoyuan.models.experts import Router
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
    ours.grouped_linear.default,
    ours.attention.default,
}


# Marks for profilers, which FSDP sets around experts within a layer, and not equally often when it is computed again.
SAC_IGNORED_OPS |= {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


def apply_recompute(model: Decoder, layout: Layout) -> None:
    """Let every `layout.recompute_every`-th layer of a stage compute its activations again, in place."""
    if layout.recompute == "none":
        return
    for number, layer in enumerate(model.layers):
        if number % layout.recompute_every == 0:
            options = _options(layer, layout.recompute == "selective")
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **options)


def _options(layer: nn.Module, selective: bool) -> dict[str, Any]:
    """Return what checkpointing of this layer needs; torch.compile knows no contexts but those of selection."""
    if any(isinstance(module, Router) for module in layer.modules()):
        return {"context_fn": functools.partial(_contexts, layer, selective)}
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)} if selective else {}


def _contexts(layer: nn.Module, selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of the forward pass and of the one that is computed again."""
    if not selective:
        return nullcontext(), _again(layer, nullcontext())
    forward, again = create_selective_checkpoint_contexts(_policy)
    return forward, _again(layer, again)


@contextmanager
def _again(layer: nn.Module, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Keep routers from counting the same tokens twice."""
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    for router in routers:
        router.counts = False
    try:
        with inner:
            yield
    finally:
        for router in routers:
            router.counts = True


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE

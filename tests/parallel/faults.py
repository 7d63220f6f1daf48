"""Bugs planted on purpose, the classical ones of each axis: every one of them must show in the table of layouts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from liaoyuan.parallel import context, expert, pipeline, program, tensor
from liaoyuan.parallel.program import Program


def averaged_gradients() -> None:
    """FSDP: gradients divided by the number of processes, though the loss is a share of the global mean."""
    FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None


def unsummed_output() -> None:
    """Tensor parallel: the partial outputs of a layer are not added up."""
    tensor.scatter_sum = lambda x, group: x.chunk(group.size())[group.rank()]


def unsummed_norms() -> None:
    """Tensor parallel: gradients of replicated weights are taken for whole."""
    program.sum_uncut = lambda named, group: None


def bias_added_by_all() -> None:
    """Tensor parallel: the bias after a summed product is added once for each process."""
    import re

    tensor.ADDED_ONCE = re.compile("$^")


def positions_from_zero() -> None:
    """Context parallel: each process counts positions from its own first token."""
    right: Callable[..., dict[str, Tensor]] = Program._own

    def wrong(self: Program, batch: Any) -> dict[str, Tensor]:
        own = right(self, batch)
        return own | {"positions": own["positions"] - own["positions"][0]}

    Program._own = wrong


def leaking_documents() -> None:
    """Ring: a token sees the documents before its own."""
    context._first_seen = lambda boundaries, tokens, window: torch.zeros(tokens, dtype=torch.int64)


def stale_maximum() -> None:
    """Ring: blocks are added up without the weights of their softmax."""
    context.merge = lambda out, lse, more, more_lse: (out + more, torch.logaddexp(lse, more_lse))


def swapped_heads() -> None:
    """Ulysses: heads come back in the order of the wrong dimension."""

    def wrong(out: Tensor, heads: int, group: Any) -> Tensor:
        size, rows = group.size(), out.shape[0] // group.size()
        got = context.exchange_rows(out.flatten(1), [rows] * size, [rows] * size, group)
        return got.view(rows, heads, -1)

    context._heads_for_tokens = wrong


def averaged_microbatches() -> None:
    """Pipeline: gradients divided by the number of microbatches."""
    from torch.distributed.pipelining import schedules

    for name in pipeline.SINGLE.values():
        made: Any = getattr(schedules, name)
        setattr(schedules, name, lambda *args, made=made, **options: made(*args, **(options | {"scale_grads": True})))


def lost_addend() -> None:
    """Pipeline: a stage hands on the residual stream without its last layer's addend."""
    right = pipeline.Stage.forward

    def wrong(self: Any, *inputs: Tensor, **options: Tensor) -> Tensor:
        original = self.decoder.run_layers
        if not self.is_last:
            self.decoder.run_layers = lambda *args: (lambda pair: (pair[0], 0 * pair[1]))(original(*args))
        return right(self, *inputs, **options)

    pipeline.Stage.forward = wrong


def weights_given_back_too_early() -> None:
    """Pipeline: FSDP takes the weights away between the two halves of a split backward pass."""
    from liaoyuan.parallel import fsdp

    right = fsdp.fully_shard
    fsdp.fully_shard = lambda module, **options: right(module, **(options | {"reshard_after_forward": True}))


def unsorted_experts() -> None:
    """Experts: rows arrive grouped by sender and are not grouped by expert."""
    expert._sort_by_expert = lambda rows, arriving: (rows, torch.arange(len(rows)), arriving.sum(0))


def counted_by_all() -> None:
    """The loss is counted by each process of a tensor-parallel group."""
    Program._counted = lambda self, loss: loss


FAULTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "averaged gradients": ("dense", "fsdp 2", averaged_gradients),
    "averaged gradients of replicas": ("dense", "hsdp 2 x 2", averaged_gradients),
    "unsummed output": ("dense", "tp 2", unsummed_output),
    "unsummed norms": ("dense", "tp 2", unsummed_norms),
    "bias added by all": ("tied", "tp 4", bias_added_by_all),
    "loss counted by all": ("dense", "tp 2", counted_by_all),
    "positions from zero, ulysses": ("dense", "ulysses 2", positions_from_zero),
    "positions from zero, ring": ("dense", "ring 2", positions_from_zero),
    "leaking documents": ("dense", "ring 2", leaking_documents),
    "leaking documents, hybrid": ("latent", "ring 2 x ulysses 2", leaking_documents),
    "stale maximum": ("dense", "ring 4", stale_maximum),
    "swapped heads": ("dense", "ulysses 2", swapped_heads),
    "averaged microbatches": ("dense", "1f1b", averaged_microbatches),
    "lost addend": ("dense", "1f1b", lost_addend),
    "weights given back too early": ("dense", "zbv", weights_given_back_too_early),
    "unsorted experts": ("experts", "ep 2", unsorted_experts),
}

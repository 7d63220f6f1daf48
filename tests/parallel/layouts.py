"""What the layouts are compared on: models, a batch of packed documents, and the loss and gradients of one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liaoyuan.data.batches import Batch, TokenBatches, TokenStream
from liaoyuan.models import Decoder, ModelConfig, config_from_dict, initialise
from liaoyuan.ops import Penalties
from liaoyuan.parallel import Layout, Program, Shape, World, lay_out, resolve

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
MODELS: dict[str, dict[str, Any]] = {
    "dense": COMMON | {"model_type": "qwen3", "attention_bias": True},
    "tied": COMMON | {"model_type": "llama", "tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    "experts": COMMON | EXPERTS | {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": True},
    "latent": COMMON
    | EXPERTS
    | LATENT
    | {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
    | {"first_k_dense_replace": 1},
    "sinks": COMMON | {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 7},
}
ROWS, LENGTH = 8, 48


@dataclass(frozen=True)
class Outcome:
    """The loss of one global batch, the whole gradients, and how often each expert of each layer was chosen.

    penalty: what `Penalties` added to the loss.
    """

    loss: float
    gradients: dict[str, Tensor]
    loads: dict[str, Tensor]
    penalty: float = 0.0


def model_of(kind: str, dtype: torch.dtype) -> Decoder:
    """Return a model with random weights, all of them (norms, biases, sinks) different from each other."""
    model = initialise(Decoder(config_from_dict(MODELS[kind])), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            size = 0.02 if "correction" in name else 0.1
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)
    model.train()
    return model.double() if dtype is torch.float64 else model.to(dtype)


def rows_of(layout: Layout, microbatches: int, processes: int) -> int:
    """Return the rows of the global batch: with context parallel a microbatch is one, so that documents lie across the
    cuts.
    """
    if layout.context == 1:
        return ROWS
    return microbatches * processes // (layout.pp * layout.tp * layout.context)


def batches_of(config: ModelConfig, microbatches: int, rank: int, size: int, rows: int = ROWS) -> list[Batch]:
    """Return this process's part of a global batch in which documents of 1 to 40 tokens are packed."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, 4 * ROWS * LENGTH + 1).astype(np.uint16)
    starts = np.unique(np.concatenate([[0], generator.integers(1, 40, 200).cumsum()]))
    stream = TokenStream(tokens, starts[starts < len(tokens)])
    batches = TokenBatches(stream, 0, rows * LENGTH, LENGTH, microbatches, rank, size)(0)
    for batch in batches:  # not all tokens count alike
        batch.weights.copy_(1.0 + batch.tokens % 3)
    return batches


def step(
    world: World,
    kind: str,
    dtype: torch.dtype,
    layout: Layout,
    microbatches: int,
    plant: Callable[[], None] = lambda: None,
    penalties: Penalties | None = None,
    rows: int | None = None,
) -> Outcome:
    """Compute one step's loss and gradients in a layout, with a bug if one is planted in this process."""
    plant()
    rows = rows or rows_of(layout, microbatches, world.size)
    config = config_from_dict(MODELS[kind])
    layout = resolve(layout, world.size, Shape(config, LENGTH, rows, microbatches))
    world = world.arrange(layout)
    program = lay_out(model_of(kind, dtype), layout, world)
    batches = batches_of(config, microbatches, world.data_rank, world.data_size, rows)
    weight = world.sum_numbers(sum(float(b.weights.sum()) for b in batches) * world.counts)[0]
    losses = program.backward(batches, 1.0 / weight, penalties=penalties)
    loss, *penalty = world.sum_numbers(*losses.view(-1).tolist())
    return Outcome(loss, _gradients(program), _loads(program, world), *penalty)


def _gradients(program: Program) -> dict[str, Tensor]:
    own = {}
    for name, weight in program.named_parameters():
        own[name] = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    for name, tensor in program.named_tensors():  # buffers, which have none
        own.setdefault(name, torch.zeros_like(tensor))
    return dict(program.whole_tensors(own))


def _loads(program: Program, world: World) -> dict[str, Tensor]:
    loads = {}
    with torch.device("meta"):
        names = [name for name, _ in Decoder(program.config).routers()]
    own = {name: router for model in program.models for name, router in model.routers()}
    for name in names:
        load = own[name].load.double() if name in own else torch.zeros(8, dtype=torch.float64)
        loads[name] = world.sum(load)
    return loads

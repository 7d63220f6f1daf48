"""Adapters in training: which projections get one, how it begins, and how it leaves as PEFT's files.

LoRA (Hu et al. 2021, arXiv 2106.09685), rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732), DoRA (Liu et al.
2024, arXiv 2402.09353), each on whole weights or on weights of few bits (Dettmers et al. 2023, arXiv 2305.14314).

Adapted are the projections of attention and of dense feed-forward layers, a mixture's shared experts among them. Routed
experts, routers, embedding and head stay as they are: every token must be able to have another adapter where one is
served, and an adapter of each of many experts would cost more than what it saves.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from liaoyuan.checkpoint.adapters import save_adapter
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models import Decoder
from liaoyuan.models.lora import LowRank, Part, Projection, parts_of, projections, whole_weight
from liaoyuan.ops import wide
from liaoyuan.parallel import Layout, Program, World, full_weights, local, take_part

Method = Literal["full", "lora", "rslora", "dora"]
SCALE = 2.0  # alpha / rank of LoRA's usual 32 and 16
GROUPS = {"all": "", "attention": ".self_attn.", "feed_forward": ".mlp."}  # what a projection's name has in it


class LoraConfig(Config):
    """The section `[lora]`.

    alpha: 0 is twice the rank, of rsLoRA twice the root of 16: the same scale at rank 16, and its own way with ranks.
    targets: "all", "attention", "feed_forward", or names of the family's projections, such as "q_proj".
    base: in how many bits the model lies below the adapters.
    """

    rank: int = Field(16, gt=0)
    alpha: float = Field(0.0, ge=0)
    targets: tuple[str, ...] = ("all",)
    dropout: float = Field(0.0, ge=0, lt=1)
    base: Literal["whole", "int8", "int4"] = "whole"

    def alpha_of(self, method: Method) -> float:
        """Return alpha as PEFT's files have it."""
        return self.alpha or (SCALE * math.sqrt(16) if method == "rslora" else SCALE * self.rank)

    def scale_of(self, method: Method) -> float:
        """Return by what B A is multiplied."""
        return self.alpha_of(method) / (math.sqrt(self.rank) if method == "rslora" else self.rank)


def add_adapters(model: Decoder, method: Method, config: LoraConfig) -> Decoder:
    """Freeze `model`, which may be on the meta device, and put adapters without values on it, to be filled by `begin`.

    They are fp32, as PEFT's are; what they compute has the model's dtype.

    Raises:
        LiaoyuanError: the model has no such projections.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module, parts in _targeted(model, config):
        out, depth = module.weight.shape
        place = model.embed_tokens.weight.device
        dtype = torch.float64 if model.embed_tokens.weight.dtype is torch.float64 else torch.float32
        pairs = {
            part.name: (
                torch.empty(config.rank, depth, device=place, dtype=dtype),
                torch.empty(len(part.rows), config.rank, device=place, dtype=dtype),
            )
            for part in parts
        }
        adapter = LowRank(parts, pairs, config.scale_of(method), out, config.dropout)
        module.adapter = adapter.with_magnitudes(module) if method == "dora" else adapter
    return model


def begin(program: Program, seed: int) -> None:
    """Give adapters their first values: A uniform within 1 / sqrt(K), B zero, magnitudes the norms of the weights'
    rows, so that the model begins as it was. Drawn as whole tensors in the order of names, whatever the layout.

    Every process makes the call, after the base has its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for adapter, module in _adapters(program):
        for a, b in zip(adapter.lora_A, adapter.lora_B, strict=True):
            bound = a.shape[1] ** -0.5  # PEFT's own, of He et al. 2015
            take_part(a, (2 * torch.rand(a.shape, generator=generator) - 1) * bound)
            with torch.no_grad():
                local(b.detach()).zero_()
        if len(adapter.lora_magnitude_vector):
            ((_, weight),) = full_weights([("", whole_weight(module))])
            norms = torch.linalg.vector_norm(wide(weight), dim=1)
            for part, vector in zip(adapter.parts, adapter.lora_magnitude_vector, strict=True):
                take_part(vector, norms[part.rows.to(norms.device)])


def save_adapters(program: Program, folder: Path, base: Path, method: Method, config: LoraConfig, world: World) -> None:
    """Write the adapters of `program` to `folder` in PEFT's format. Every process makes the call; the first writes."""
    tensors = dict(full_weights(_named(program)))
    targets = {name.split(".")[-2] for name in tensors}
    if world.is_first:
        words = {
            "base_model_name_or_path": str(base),
            "r": config.rank,
            "lora_alpha": config.alpha_of(method),
            "lora_dropout": config.dropout,
            "target_modules": sorted(targets),
            "use_rslora": method == "rslora",
            "use_dora": method == "dora",
        }
        save_adapter(folder, tensors, words)
    world.barrier()


def refuse_layout(layout: Layout, config: LoraConfig, processes: int) -> None:
    """Raise LiaoyuanError if adapters are not trained in this layout."""
    if layout.tp * layout.pp * layout.context * layout.ep > 1:
        raise LiaoyuanError(
            f"Adapters are trained with the axes dp and fsdp alone, not with {layout.describe()}: a part of a "
            "projection would need a part of its adapter."
        )
    if config.base != "whole" and processes > 1:
        raise LiaoyuanError(
            f"lora.base = '{config.base}' is for one process: weights of few bits are not cut up. Take lora.base = "
            "'whole', whose weights are sharded, or one process."
        )


def trained_parameters(program: Program) -> int:
    """Return how many numbers are trained, over all processes."""
    return sum(parameter.numel() for _, parameter in program.named_parameters() if parameter.requires_grad)


def _targeted(model: Decoder, config: LoraConfig) -> Iterator[tuple[Projection, list[Part]]]:
    """Yield each projection of ours that gets an adapter, and those of its parts that do."""
    known: set[str] = set()
    found: set[str] = set()
    chosen = []
    for name, module in projections(model).items():
        parts = parts_of(name, module, model.config)
        known |= {_leaf(part.name) for part in parts}
        wanted = [part for part in parts if any(_is_meant(part.name, target) for target in config.targets)]
        found |= {target for target in config.targets for part in parts if _is_meant(part.name, target)}
        chosen += [(module, wanted)] if wanted else []
    lacking = next((target for target in config.targets if target not in found), None)
    if lacking is not None or not chosen:
        words = [*GROUPS, *sorted(known)]
        hint = nearest(str(lacking), words) or "."
        raise LiaoyuanError(
            f"lora.targets: this model has no projections '{lacking}'{hint} It has: {', '.join(words)}."
        )
    yield from chosen


def _is_meant(name: str, target: str) -> bool:
    return GROUPS[target] in name if target in GROUPS else _leaf(name) == target


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _adapters(program: Program) -> Iterator[tuple[LowRank, Projection]]:
    for model in program.models:
        for module in projections(model).values():
            if isinstance(module.adapter, LowRank):
                yield module.adapter, module


def _named(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all adapters by the names that `save_adapter` wants."""
    for adapter, _ in _adapters(program):
        for half in ("lora_A", "lora_B", "lora_magnitude_vector"):
            for part, tensor in zip(adapter.parts, getattr(adapter, half), strict=False):
                yield f"{part.name}.{half}", tensor

"""Where our tensors lie in a Hugging Face folder.

The decoder merges projections that read the same input and stacks experts. `parts` of one of our tensors are their
tensors, each with the view of ours that it fills: reading fills the views (`checkpoint/filling.py`), writing copies out
of them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liaoyuan.models.config import ModelConfig
from liaoyuan.models.rotary import head_order


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a folder: its name, the view of ours that it fills, and its own shape.

    order: for each index of the view's `dim`, which of the file's it is (None: the same).
    """

    name: str
    view: Tensor
    shape: torch.Size
    order: Sequence[int] | None = None
    dim: int = 0

    def write(self) -> Tensor:
        """Return the file's tensor."""
        ours = self.view
        if self.order is not None:
            inverse = torch.tensor(self.order).argsort()
            ours = ours.index_select(self.dim, inverse.to(ours.device))
        return ours.reshape(self.shape)


Parts = Callable[[str, Tensor, ModelConfig], list[Part]]


def common_parts(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    """Return the parts of our tensor `name` as Llama's descendants store them."""
    theirs = name if name.startswith("lm_head.") else f"model.{name}"
    if ".qkv_proj." in name:
        return query_key_value(theirs, ours, config)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return [Part(theirs, ours, ours.shape, head_order(config.rotary, config.head_dim))]
    if ".gate_up_proj." in name:
        return gate_up(theirs, ours)
    return [whole(theirs, ours)]


COPIES = {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}


def further_parts(name: str, ours: Tensor, config: ModelConfig, parts: Parts) -> list[Part]:
    """Return the parts of a tensor of a further layer, none if it is of no such one: `further.k` is stored as one more
    decoder layer (of the family's `parts`) with the norms and the projection before it and the norm behind it.
    """
    further = re.match(r"further\.(\d+)\.(.*)", name)
    if further is None:
        return []
    layer = f"layers.{config.num_hidden_layers + int(further[1])}"
    if further[2].startswith("layer."):
        return parts(f"{layer}.{further[2].removeprefix('layer.')}", ours, config)
    own = "shared_head.norm.weight" if further[2] == "norm.weight" else further[2]
    return [whole(f"model.{layer}.{own}", ours)]


def further_copies(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    """Return the copies that the files of further layers hold of the model's own embedding and head."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.further_layers)
    return [whole(f"model.layers.{layer}.{COPIES[name]}", ours) for layer in layers if name in COPIES]


def whole(name: str, ours: Tensor) -> Part:
    """Return the part of a tensor that is stored as it is."""
    return Part(name, ours, ours.shape)


def query_key_value(name: str, ours: Tensor, config: ModelConfig) -> list[Part]:
    """Return the parts of `qkv_proj`: for each key-value head its query heads, its key, its value."""
    heads, dim = config.num_key_value_heads, config.head_dim
    blocks = ours.view(heads, -1, dim, *ours.shape[1:])
    order = head_order(config.rotary, dim)
    views = {"q": blocks[:, :-2], "k": blocks[:, -2], "v": blocks[:, -1]}
    return [
        Part(
            name.replace("qkv_proj", f"{letter}_proj"),
            view,
            torch.Size([view.numel() // ours.shape[1:].numel(), *ours.shape[1:]]),
            None if letter == "v" else order,
            view.ndim - ours.ndim,
        )
        for letter, view in views.items()
    ]


def gate_up(name: str, ours: Tensor) -> list[Part]:
    """Return the parts of `gate_up_proj`, in whose rows gate and up alternate."""
    return [whole(name.replace("gate_up_proj", part), ours[n::2]) for n, part in enumerate(("gate_proj", "up_proj"))]


def gate_above_up(name: str, ours: Tensor) -> list[Part]:
    """Return the part of `gate_up_proj` that is stored as one tensor, all of gate before all of up."""
    return [Part(name, ours.unflatten(0, (-1, 2)).transpose(0, 1), ours.shape)]


def experts(prefix: str, ours: Tensor, names: Iterable[str]) -> list[Part]:
    """Return the parts of stacked experts stored one by one as `prefix.<expert>.<name>.weight`.

    names: of gate and up for a stack of gate_up projections, else of the only one.
    """
    names = list(names)
    step = len(names)
    return [
        whole(f"{prefix}.{expert}.{name}.weight", ours[expert, n::step])
        for expert in range(ours.shape[0])
        for n, name in enumerate(names)
    ]

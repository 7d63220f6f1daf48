"""The weights of a running engine: their checksum, and replacing them in place, whole or not at all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from liaoyuan.checkpoint import load_weights
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models import Decoder, read_config
from liaoyuan.models.quantised import as_kept
from liaoyuan.ops import checksum

Weights = Mapping[str, Tensor] | Path


def weights_checksum(model: Decoder) -> str:
    """Return 16 hexadecimal digits of all weights; equal weights give equal digits on every device."""
    own = _own(model)
    return f"{checksum(*(own[name] for name in sorted(own))):016x}"


def checked_weights(model: Decoder, weights: Weights) -> Mapping[str, Tensor]:
    """Return new weights for `copy_weights`: of a Hugging Face folder, or (all or some) by the model's own names.

    What a model keeps in few bits is given whole, and quantised here.

    Raises:
        LiaoyuanError: a name is unknown, a shape differs, a value is no number, or a file is missing or torn.
    """
    if isinstance(weights, Path):
        weights = _read(model, weights)
    weights = {own: kept for name, value in weights.items() for own, kept in as_kept(model, name, value).items()}
    own = _own(model)
    for name, value in weights.items():
        _check(name, value, own)
    return weights


def copy_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into the model, in place."""
    own = _own(model)
    for name, value in weights.items():
        own[name].copy_(value)


def drop_weights(model: Decoder) -> dict[str, torch.Size]:
    """Give the memory of the weights back; return their shapes for `take_weights`."""
    shapes = {}
    for name, tensor in _own(model).items():
        shapes[name] = tensor.shape
        tensor.data = tensor.new_empty(0)
    return shapes


def take_weights(model: Decoder, shapes: Mapping[str, torch.Size]) -> None:
    """Take memory for dropped weights; what is in it means nothing."""
    own = _own(model)
    fresh = {name: own[name].new_empty(shape) for name, shape in shapes.items()}
    for name, tensor in fresh.items():
        own[name].data = tensor


def _own(model: Decoder) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def _read(model: Decoder, folder: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a folder, read beside the model's own, so that a torn file harms nothing.

    A folder may lack the further layers, as one that training wrote does: the model keeps its own then (they only
    guess).
    """
    config = model.config
    if config.further_layers and not read_config(folder, further=True).further_layers:
        config = replace(config, further_layers=0)
    fresh = Decoder(config).to(model.embed_tokens.weight.device)
    load_weights(fresh, folder)
    return _own(fresh)


def _check(name: str, value: Tensor, own: Mapping[str, Tensor]) -> None:
    if name not in own:
        raise LiaoyuanError(f"The model has no weight '{name}'{nearest(name, own) or '.'}")
    if value.shape != own[name].shape:
        raise LiaoyuanError(f"The weight '{name}' is {list(value.shape)}, but the model's is {list(own[name].shape)}.")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise LiaoyuanError(f"The new weight '{name}' has values that are not numbers.")

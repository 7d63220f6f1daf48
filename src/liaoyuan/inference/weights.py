"""The weights of a running engine: their checksum, and replacing them in place, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from liaoyuan.checkpoint import load_weights
from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models import Decoder
from liaoyuan.ops import checksum

Weights = Mapping[str, Tensor] | Path


def weights_checksum(model: Decoder) -> str:
    """Return 16 hexadecimal digits of all weights; equal weights give equal digits on every device."""
    own = _own(model)
    return f"{checksum(*(own[name] for name in sorted(own))):016x}"


def checked_weights(model: Decoder, weights: Weights) -> Mapping[str, Tensor]:
    """Return new weights for `copy_weights`: of a Hugging Face folder, or (all or some) by the model's own names.

    Raises:
        LiaoyuanError: a name is unknown, a shape differs, a value is no number, or a file is missing or torn.
    """
    if isinstance(weights, Path):
        weights = _read(model, weights)
    own = _own(model)
    for name, value in weights.items():
        _check(name, value, own)
    return weights


def copy_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into the model, in place."""
    own = _own(model)
    for name, value in weights.items():
        own[name].copy_(value)


def storages(model: Decoder) -> dict[torch.UntypedStorage, int]:
    """Return the memory of the weights, each piece once, with its bytes."""
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _own(model).values()}
    return {piece: piece.nbytes() for piece in pieces.values()}


def _own(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def _read(model: Decoder, folder: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a folder, read beside the model's own, so that a torn file harms nothing."""
    fresh = Decoder(model.config).to(model.embed_tokens.weight.device)
    load_weights(fresh, folder)
    return _own(fresh)


def _check(name: str, value: Tensor, own: Mapping[str, Tensor]) -> None:
    if name not in own:
        raise LiaoyuanError(f"The model has no weight '{name}'{nearest(name, own) or '.'}")
    if value.shape != own[name].shape:
        raise LiaoyuanError(f"The weight '{name}' is {list(value.shape)}, but the model's is {list(own[name].shape)}.")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise LiaoyuanError(f"The new weight '{name}' has values that are not numbers.")

"""One model code for training and inference; knows nothing of distribution.

A `Decoder` is described by a Hugging Face `config.json` and takes flat batches with an attention context.
`families/` knows how each family writes its config and weights.
"""

from liaoyuan.models.config import ModelConfig, config_from_dict, read_config, with_dtype
from liaoyuan.models.context import (
    AttentionContext,
    BranchedContext,
    PackedContext,
    Pattern,
    branched_context,
    packed_context,
)
from liaoyuan.models.decoder import Decoder, initial_weights, initialise
from liaoyuan.models.quantised import quantisation_named, quantise_model
from liaoyuan.models.quantised_linear import Quantisation

__all__ = [
    "AttentionContext",
    "BranchedContext",
    "Decoder",
    "ModelConfig",
    "PackedContext",
    "Pattern",
    "Quantisation",
    "branched_context",
    "config_from_dict",
    "initial_weights",
    "initialise",
    "packed_context",
    "quantisation_named",
    "quantise_model",
    "read_config",
    "with_dtype",
]

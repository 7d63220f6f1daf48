"""Operators: for each, a reference that is its specification, and faster kernels per device.

A kernel is used only if its self-test passes on this machine; `status()` says which kernels are in use and why, and
`configure()` overrides the choice.
`build()` compiles the CPU kernels ahead, `compile_ahead()` an accelerator's; otherwise it happens on first use.
"""

from liaoyuan.ops.ahead import compile_ahead
from liaoyuan.ops.attention import attention
from liaoyuan.ops.block_attention import block_attention, block_attention_backward, merge
from liaoyuan.ops.buffers import checksum, pack, unpack
from liaoyuan.ops.build import build
from liaoyuan.ops.choice import OperatorStatus, configure, is_exactness_sought, measure, seek_exactness, status
from liaoyuan.ops.cross_entropy import (
    CrossEntropy,
    LogitStatistics,
    Penalties,
    ReadLogits,
    linear_cross_entropy,
    logit_statistics,
    merge_statistics,
    token_log_prob,
)
from liaoyuan.ops.decoder_layer import (
    FewBits,
    LayerWeights,
    Pages,
    decoder_layer,
    layer_kernel,
    quantised_decoder_layer,
)
from liaoyuan.ops.gated import clamped_swiglu, geglu, swiglu
from liaoyuan.ops.grouped_linear import grouped_linear
from liaoyuan.ops.linear import exact_rows, linear
from liaoyuan.ops.log_sum_exp import log_probability, log_sum_exp
from liaoyuan.ops.norm import add_rms_norm, rms_norm
from liaoyuan.ops.operator import wide
from liaoyuan.ops.optimiser import adamw_step, clip, global_norm, newton_schulz, square_sum
from liaoyuan.ops.paged_attention import paged_attention, write_cache
from liaoyuan.ops.permutation import combine_rows, permute_rows
from liaoyuan.ops.quantised_linear import QuantisedWeight, dequantise, quantise, quantised_linear
from liaoyuan.ops.rotary import latent_rotary, split_rotary
from liaoyuan.ops.route import route
from liaoyuan.ops.sampling import Sampled, packed_mask, sample_tokens, sampling_settings

__all__ = [
    "CrossEntropy",
    "FewBits",
    "LayerWeights",
    "LogitStatistics",
    "OperatorStatus",
    "Pages",
    "Penalties",
    "QuantisedWeight",
    "ReadLogits",
    "Sampled",
    "adamw_step",
    "add_rms_norm",
    "attention",
    "block_attention",
    "block_attention_backward",
    "build",
    "checksum",
    "clamped_swiglu",
    "clip",
    "combine_rows",
    "compile_ahead",
    "configure",
    "decoder_layer",
    "dequantise",
    "exact_rows",
    "geglu",
    "global_norm",
    "grouped_linear",
    "is_exactness_sought",
    "latent_rotary",
    "layer_kernel",
    "linear",
    "linear_cross_entropy",
    "log_probability",
    "log_sum_exp",
    "logit_statistics",
    "measure",
    "merge",
    "merge_statistics",
    "newton_schulz",
    "pack",
    "packed_mask",
    "paged_attention",
    "permute_rows",
    "quantise",
    "quantised_decoder_layer",
    "quantised_linear",
    "rms_norm",
    "route",
    "sample_tokens",
    "sampling_settings",
    "seek_exactness",
    "split_rotary",
    "square_sum",
    "status",
    "swiglu",
    "token_log_prob",
    "unpack",
    "wide",
    "write_cache",
]

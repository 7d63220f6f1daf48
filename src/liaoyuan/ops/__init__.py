"""Operators: for each, a reference that is its specification, and faster kernels per device.

A kernel is used only if its self-test passes on this machine; `status()` says which kernels are in use and why, and
`configure()` overrides the choice.
`build()` compiles the CPU kernels ahead; otherwise it happens on first use.
"""

from liaoyuan.ops.attention import attention
from liaoyuan.ops.block_attention import block_attention, block_attention_backward, merge
from liaoyuan.ops.build import build
from liaoyuan.ops.choice import OperatorStatus, configure, measure, status
from liaoyuan.ops.linear import linear
from liaoyuan.ops.norm import add_rms_norm, rms_norm
from liaoyuan.ops.operator import wide
from liaoyuan.ops.paged_attention import paged_attention, write_cache
from liaoyuan.ops.rotary import rotate, split_rotary
from liaoyuan.ops.swiglu import swiglu
from liaoyuan.ops.token_log_prob import token_log_prob

__all__ = [
    "OperatorStatus",
    "add_rms_norm",
    "attention",
    "block_attention",
    "block_attention_backward",
    "build",
    "configure",
    "linear",
    "measure",
    "merge",
    "paged_attention",
    "rms_norm",
    "rotate",
    "split_rotary",
    "status",
    "swiglu",
    "token_log_prob",
    "wide",
    "write_cache",
]

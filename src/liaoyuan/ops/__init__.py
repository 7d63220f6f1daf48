"""Operators: for each, a reference that is its specification, and faster kernels per device.

A kernel is used only if its self-test passes on this machine; `status()` says which kernels are in use.
"""

from liaoyuan.ops.attention import attention
from liaoyuan.ops.norm import add_rms_norm, rms_norm
from liaoyuan.ops.paged_attention import paged_attention
from liaoyuan.ops.rotary import split_rotary
from liaoyuan.ops.swiglu import swiglu
from liaoyuan.ops.token_log_prob import token_log_prob

__all__ = [
    "add_rms_norm",
    "attention",
    "paged_attention",
    "rms_norm",
    "split_rotary",
    "swiglu",
    "token_log_prob",
]

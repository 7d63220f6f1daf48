"""Kernels in Triton, for CUDA and, from the same source, Ascend.

Each module has functions called like the operators and their backward sides. Modules are loaded by `ops.kernels` when
an operator is first used on an accelerator; nothing here is imported before, for Triton may not be installed.
Kernels use what both compilers know: no inline assembly, descriptors or atomics; each sum has one fixed order.
"""

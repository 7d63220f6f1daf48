"""Compile the Triton kernels for a card that need not be there, and print what each of them occupies.

python -m tests.ops.triton.compiled [COMPUTE CAPABILITY, 80] [DTYPES, bfloat16,float32] [KINDS, all or hardest]
    [HEAD SIZES, 64 128 256]
One JSON object a line: kernel, dtype of the inputs, bytes of shared memory, registers of a thread, bytes that spill.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from liaoyuan.ops.operator import OPERATORS, outputs_and_gradients

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


# Each kind of their inputs has a kernel of its own; which of their samples asks the most of it.
WITH_KINDS = {"quantised_linear": -1, "route": -1, "sample_tokens": 1}


class Card:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def occupied(kernel):
    """Return the registers of a thread and the bytes that spill, as the binary says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "spilled": int(found[2])}


def inputs(name, dtype, kinds, head_dims):
    """Yield inputs of usual sizes: heads of several, and whatever is the operator's own workload."""
    if name == "attention":
        for dim in head_dims:
            query, key, value = (torch.zeros(256, heads, dim, dtype=dtype) for heads in (8, 2, 2))
            yield query, key, value, torch.tensor([0, 256], dtype=torch.int32), 0.1
    elif name == "block_attention":
        for dim in head_dims:
            query, key, value = (torch.zeros(256, heads, dim, dtype=dtype) for heads in (8, 2, 2))
            yield query, key, value, torch.zeros(256, dtype=torch.long), torch.full((256,), 256), 0.1
    elif name == "paged_attention":
        for dim in head_dims:
            query, cache = torch.zeros(16, 8, dim, dtype=dtype), torch.zeros(128, 16, 2, dim, dtype=dtype)
            starts, lengths = torch.tensor([0, 16], dtype=torch.int32), torch.tensor([2048], dtype=torch.int32)
            yield query, cache, cache, torch.zeros(1, 128, dtype=torch.int32), starts, lengths, 0.1
    elif name == "loss_head":  # of fewer rows: gradients of the weight are torch's own product, computed here
        hidden, weight, targets, *how = OPERATORS[name].workload(dtype)
        yield hidden[:64], weight[:4096], targets[:64] % 4096, *how
    else:
        operator = OPERATORS[name]
        yield operator.workload(dtype) if operator.workload else list(operator.samples(dtype))[-1]
        if name in WITH_KINDS:
            samples = list(operator.samples(dtype))
            yield from samples if kinds == "all" else [samples[WITH_KINDS[name]]]


def main(capability=80, dtypes="bfloat16,float32", kinds="all", *head_dims):
    """Run every kernel's launching code, and compile where it would launch."""
    driver.set_active(Card(int(capability)))
    compile_or_launch, seen = JITFunction.run, set()

    def run(self, *arguments, grid, warmup, **options):
        kernel = compile_or_launch(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            line = {"operator": name, "kernel": self.__name__, "dtype": str(dtype)[6:], "dim": options.get("DIM")}
            line |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared} | occupied(kernel)
            print(json.dumps(line), flush=True)

    JITFunction.run = run
    for name, operator in OPERATORS.items():
        for loaded in [kernel for kernel in operator.kernels if kernel.name == "triton"]:
            loaded.load(name, "cpu")(True)
            for dtype in [getattr(torch, each) for each in dtypes.split(",")]:
                for sample in inputs(name, dtype, kinds, [int(dim) for dim in head_dims] or [64, 128, 256]):
                    outputs_and_gradients(operator, operator.call, sample)


if __name__ == "__main__":
    main(*sys.argv[1:])

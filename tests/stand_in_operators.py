"""Run by `ops/test_ascend.py` in a process of its own: a device called `npu`, without torch_npu and then with a
stand-in for it. Prints one JSON object."""

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ["STAND_IN_NAME"] = "npu"
sys.path.insert(0, str(Path(__file__).parent))
import torch

import stand_in_steps as steps
import stand_in_torch_npu as vendor
from liaoyuan import ops
from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS

NAMES = [name for name, operator in OPERATORS.items() if any(kernel.name == "npu" for kernel in operator.kernels)]
find_spec = importlib.util.find_spec


def chosen() -> dict[str, list[str]]:
    """Return for each of the operators the kernel in use, and why."""
    return {row.operator: [row.kernel, row.reason] for row in ops.status("npu") if row.operator in NAMES}


def refused(module, name: str) -> list[str]:
    """Return the operators that do not use the vendor's while one of its operators is off by a little."""
    right = getattr(module, name)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        first, *others = [found] if isinstance(found, torch.Tensor) else found
        first = first * 1.05 + 0.05
        return first if isinstance(found, torch.Tensor) else type(found)([first, *others])

    setattr(module, name, wrong)
    choice.forget()
    rows = chosen()
    setattr(module, name, right)
    return [operator for operator, (kernel, _) in rows.items() if kernel != "npu"]


def main() -> None:
    torch.set_num_threads(1)
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    found = {"names": NAMES, "without": chosen()}
    found["loaded_without"] = [name for name in ("torch_npu", "liaoyuan.ops.ascend") if name in sys.modules]
    module = vendor.install()
    choice.forget()
    found["with"] = chosen()
    device = {"cpu": torch.device("cpu"), "npu": torch.device("npu", 0)}
    vendor.CALLS.clear()
    for kind, config in (("dense", steps.DENSE), ("experts", steps.EXPERTS), ("bf16", steps.BF16)):
        found[kind] = {name: steps.losses(config, place) for name, place in device.items()}
    found["called_in_training"] = sorted(set(vendor.CALLS))
    found["refused"] = {name: refused(module, name) for name in dir(module) if name.startswith("npu_")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

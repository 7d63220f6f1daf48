"""Run by `ops/test_ascend.py` in a process of its own: a device called `npu`, without torch_npu and then with a
stand-in for it. Prints one JSON object."""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["STAND_IN_NAME"] = "npu"
sys.path.insert(0, str(Path(__file__).parent))
import torch

import stand_in_steps as steps
import stand_in_torch_npu as vendor
from liaoyuan.ops import choice
from liaoyuan.ops.operator import OPERATORS, outputs_and_gradients

NAMES = [name for name, operator in OPERATORS.items() if any(kernel.name == "npu" for kernel in operator.kernels)]
find_spec = importlib.util.find_spec


def chosen(names: list[str] = NAMES) -> dict[str, list[str]]:
    """Return for each of the operators the kernel in use, and why."""
    return {name: [row.kernel, row.reason] for name in names for row in [choice._choose(name, "npu")]}


def users() -> dict[str, list[str]]:
    """Return for each of the vendor's operators those that call it when they are chosen and tested."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        vendor.CALLS.clear()
        chosen([name])
        for called in set(vendor.CALLS):
            found.setdefault(called, []).append(name)
    return found


def without_an_import(folder: Path) -> dict[str, list[str]]:
    """Return what is chosen where torch_npu is there, but a library that it needs is not."""
    (folder / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    sys.path.insert(0, str(folder))
    choice.forget()
    rows = chosen()
    sys.path.remove(str(folder))
    importlib.invalidate_caches()
    return rows


def strided(x):
    """Return a tensor with the same numbers and gaps between them."""
    return torch.stack((x, x), -1)[..., 0] if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def emptied(x, rows: int):
    """Return a tensor without rows if it had so many (of boundaries or sizes: the numbers of none)."""
    if not isinstance(x, torch.Tensor):
        return x
    if not x.is_floating_point() and x.dim() == 1:
        return torch.zeros_like(x)
    return x[:0] if len(x) == rows else x


def edges() -> dict[str, list[float]]:
    """Return how far results from tensors with gaps are from those of the CPU."""
    found = {}
    for name in NAMES:
        operator = OPERATORS[name]
        inputs = [strided(x) for x in sample_of(operator)]
        expected = outputs_and_gradients(operator, operator.reference, inputs)
        actual = outputs_and_gradients(operator, operator.call, on_device(inputs))
        found[name] = [choice.relative_difference(a.cpu(), b) for a, b in zip(actual, expected, strict=True)]
    return found


def shapes_of_none() -> dict[str, bool]:
    """Return whether no rows give results of the right shapes."""
    found = {}
    for name in NAMES:
        operator = OPERATORS[name]
        sample = sample_of(operator)
        inputs = [emptied(x, len(sample[0])) for x in sample]
        results = operator.call(*on_device(inputs)), operator.fake(*inputs)
        actual, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in results)
        found[name] = [x.shape for x in actual] == [x.shape for x in expected]
    return found


def sample_of(operator):
    return next(iter(operator.samples(torch.bfloat16 if operator.name == "quantised_linear" else torch.float32)))


def on_device(inputs) -> tuple:
    return tuple(x.to("npu") if isinstance(x, torch.Tensor) else x for x in inputs)


def refused(module, name: str, users: list[str]) -> list[str]:
    """Return which users of one of the vendor's operators do not use the vendor's while that is off by a little."""
    right = getattr(module, name)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        first, *others = [found] if isinstance(found, torch.Tensor) else found
        first = first * 1.05 + 0.05
        return first if isinstance(found, torch.Tensor) else type(found)([first, *others])

    setattr(module, name, wrong)
    choice.forget()
    rows = chosen(users)
    setattr(module, name, right)
    return [operator for operator, (kernel, _) in rows.items() if kernel != "npu"]


def main() -> None:
    torch.set_num_threads(1)
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    found = {"names": NAMES, "without": chosen()}
    found["loaded_without"] = [name for name in ("torch_npu", "liaoyuan.ops.ascend") if name in sys.modules]
    with tempfile.TemporaryDirectory() as folder:
        found["broken"] = without_an_import(Path(folder))
    module = vendor.install()
    choice.forget()
    of_vendor = users()
    found["with"] = chosen()
    found["edges"], found["none"] = edges(), shapes_of_none()
    device = {"cpu": torch.device("cpu"), "npu": torch.device("npu", 0)}
    vendor.CALLS.clear()
    for kind, config in (("dense", steps.DENSE), ("experts", steps.EXPERTS), ("bf16", steps.BF16)):
        found[kind] = {name: steps.losses(config, place) for name, place in device.items()}
    found["called_in_training"] = sorted(set(vendor.CALLS))
    found["refused"] = {
        name: refused(module, name, of_vendor.get(name, [])) for name in dir(module) if name.startswith("npu_")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

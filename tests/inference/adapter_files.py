"""Adapters in PEFT's format with random weights, and the models into which they are merged."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from liaoyuan.checkpoint import load_model, save_model
from liaoyuan.models import Decoder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, base: Path, targets: tuple[str, ...] = ALL, rank: int = 4, seed: int = 0, **config: Any
) -> Path:
    """Write an adapter for the model in `base` and return its folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets and weight.ndim == 2:
            own = next((r for key, r in config.get("rank_pattern", {}).items() if module.endswith(key)), rank)
            for half, shape in (("lora_A", (own, weight.shape[1])), ("lora_B", (weight.shape[0], own))):
                tensors[f"base_model.model.{module}.{half}.weight"] = torch.randn(shape, generator=generator) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def merged(base: Path, adapter: Path, scale: float, folder: Path) -> Decoder:
    """Return the model of `base` with W + scale * B A for W: what the adapter means."""
    tensors, added = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in added if name.endswith("lora_A.weight")]:
        theirs = name.removeprefix("base_model.model.").replace(".lora_A", "")
        a, b = added[name].double(), added[name.replace("lora_A", "lora_B")].double()
        tensors[theirs] = (tensors[theirs].double() + scale * b @ a).to(tensors[theirs].dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return load_model(folder)


def saved(model: Decoder, folder: Path) -> Path:
    save_model(model, folder)
    return folder

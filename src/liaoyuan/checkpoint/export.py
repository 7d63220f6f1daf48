"""A Hugging Face folder from a saved state, by another process, while the training that saved it goes on."""

from contextlib import suppress
from pathlib import Path

import torch

from liaoyuan.checkpoint.hugging_face import save_model
from liaoyuan.checkpoint.reading import Damaged, read_manifest, read_tensors
from liaoyuan.checkpoint.tensors import MODEL
from liaoyuan.checkpoint.writer import states
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, config_from_dict

ATTEMPTS = 3  # the training may delete a state that it has just replaced while it is being read


def export_state(folder: Path, target: Path, tokenizer_folder: Path | None = None) -> int:
    """Write the newest whole state in `folder` to `target` as `save_model` does; return its step.

    It needs no process group and no lock: any number of processes may have written the state.

    Raises:
        LiaoyuanError: there is no whole state.
    """
    for _ in range(ATTEMPTS):
        for state in states(folder):
            with suppress(Damaged):
                step, model = _read(state)
                save_model(model, target, tokenizer_folder)
                return step
    raise LiaoyuanError(f"{folder} holds no whole checkpoint to export.")


def _read(state: Path) -> tuple[int, Decoder]:
    manifest = read_manifest(state)
    with torch.device("meta"):
        model = Decoder(config_from_dict(manifest["model"], f"the checkpoint {state}"))
    model.to_empty(device="cpu")
    read_tensors(state, manifest, {MODEL + name: tensor for name, tensor in model.state_dict().items()})
    return int(manifest["step"]), model

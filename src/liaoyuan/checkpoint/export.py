"""A Hugging Face folder from a saved state, by another process, while the training that saved it goes on."""

from contextlib import suppress
from pathlib import Path

from liaoyuan.checkpoint.hugging_face import save_model
from liaoyuan.checkpoint.reading import Damaged
from liaoyuan.checkpoint.sources import StateSource, read_all
from liaoyuan.checkpoint.writer import states
from liaoyuan.errors import LiaoyuanError

ATTEMPTS = 3  # the training may delete a state that it has just replaced while it is being read


def export_state(folder: Path, target: Path, tokenizer_folder: Path | None = None) -> int:
    """Write the newest whole state in `folder` to `target` as `save_model` does; return its step.

    It needs no process group and no lock: any number of processes may have written the state. One tensor at a time is
    in memory.

    Raises:
        LiaoyuanError: there is no whole state.
    """
    for _ in range(ATTEMPTS):
        for state in states(folder):
            with suppress(Damaged):
                source = StateSource(state)
                save_model(source.config, target, tokenizer_folder, read_all(source, source.config))
                return source.step
    raise LiaoyuanError(f"{folder} holds no whole checkpoint to export.")

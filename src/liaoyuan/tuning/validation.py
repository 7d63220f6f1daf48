"""The best checkpoint of a run, chosen on validation problems; every kind of run chooses in this one way."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from liaoyuan.data import Tokenizer
from liaoyuan.evaluation import measure_accuracy
from liaoyuan.inference import Engine, EngineConfig
from liaoyuan.models import Decoder
from liaoyuan.models.lora import kept_adapters
from liaoyuan.parallel import Program
from liaoyuan.rundir import atomic_folder, read_json, write_json
from liaoyuan.tasks import Problem, Reward
from liaoyuan.tuning.start import Start

SEQUENCES = 256  # that are answered at once
SAMPLES = 2  # of each validation problem, beside the greedy answer


class Best:
    """Called with a model: measures it on the validation problems and keeps it if none before was better, or its
    adapters, if those alone are trained.

    The weights are in `folder/best`, the value in `folder/best.json`. A resumed run comes to the same choice: what
    it repeats has the same value as before, and only a better one replaces what is kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: Start,
        reward: Reward,
        problems: Sequence[Problem],
        folder: Path,
        max_tokens: int,
    ) -> None:
        self.tokenizer, self.start, self.reward, self.problems = tokenizer, start, reward, problems
        self.folder, self.max_tokens = folder, max_tokens

    def begin_with(self, start: Path) -> None:
        """Let the model that the run starts from compete too, if it was itself chosen in this way."""
        measured = start.parent / "best.json"
        if measured.exists() and not (self.folder / "best.json").exists():
            with atomic_folder(self.model_folder) as part:
                shutil.copytree(start, part, dirs_exist_ok=True)
            write_json(self.folder / "best.json", read_json(measured))

    @property
    def model_folder(self) -> Path:
        return self.folder / "best"

    @property
    def value(self) -> float:
        """The best value so far, the mean of greedy and sampled accuracy; -1 before the first."""
        path = self.folder / "best.json"
        return float(read_json(path)["value"]) if path.exists() else -1.0

    def __call__(self, model: Decoder) -> dict[str, float]:
        with kept_adapters(model):
            answers = measure_accuracy(
                tuning_engine(model, self.max_tokens),
                self.tokenizer,
                self.reward,
                self.problems,
                SAMPLES,
                seed=1,
                max_tokens=self.max_tokens,
            )
        greedy, sampled = float(answers.greedy.mean()), float(answers.sampled.mean())
        value = (greedy + sampled) / 2
        if value > self.value:
            self.start.save(Program([model]), self.model_folder)
            write_json(self.folder / "best.json", {"value": value, "greedy": greedy, "sampled": sampled})
        return {"validation_greedy": greedy, "validation_sampled": sampled}


def tuning_engine(model: Decoder, max_tokens: int) -> Engine:
    """Return an engine for many short answers of a small model, with a cache no larger than they need."""
    room = min(model.config.max_position_embeddings, max_tokens + 64)  # 64: a prompt
    sizes = EngineConfig(max_sequences=SEQUENCES, max_batch_tokens=16 * SEQUENCES, cache_tokens=SEQUENCES * room)
    with torch.inference_mode():
        return Engine(model, sizes)

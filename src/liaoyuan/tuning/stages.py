"""The pieces of a study, each a job for a process of its own: (folder, report, arguments) -> what `done.json` holds."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from liaoyuan.checkpoint import load_model
from liaoyuan.config import Config
from liaoyuan.data import TokenisedRecord, Tokenizer
from liaoyuan.evaluation import measure_accuracy
from liaoyuan.models import Decoder, initialise, read_config, with_dtype
from liaoyuan.rundir import Report, read_json, write_atomic
from liaoyuan.tasks import Problem, Right, Task, find_task, held_out_problems, spread
from liaoyuan.training import TrainConfig
from liaoyuan.tuning.controls import own_samples
from liaoyuan.tuning.finetune import finetune, worked_solutions
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.reinforce import reinforce
from liaoyuan.tuning.start import Start
from liaoyuan.tuning.validation import Best, tuning_engine

FP32 = torch.float32  # small models: bf16 is no faster, and rollouts then agree with training to 1e-5
VALIDATION_SEED = 7  # of the validation problems, the same for every run
VALIDATIONS = 4  # in a whole run of fine-tuning, the last one at its end
SHOWN = 12  # sample solutions that the report gets


class Lesson(Config):
    """What all pieces of a study share: the task, its worked solutions, and the problems for choosing and measuring."""

    task: str = "addition"
    levels: tuple[int, ...] = (2, 3, 4)
    solutions: int = 900
    fast_every: int = 4  # so many worked solutions to one that is also shown as an answer without a thought
    hurried: float = Field(0.0, ge=0, le=1)  # share of the solutions that leave the last steps to the head
    validation_problems: int = 200
    problems: int = 2000
    samples: int = 8
    max_tokens: int = 48
    seed: int = 0

    @property
    def chosen_task(self) -> Task:
        return find_task(self.task)

    def validation(self) -> list[Problem]:
        return spread(self.chosen_task, VALIDATION_SEED, self.levels, self.validation_problems, "validation")

    def test(self) -> list[Problem]:
        return held_out_problems(self.chosen_task, self.levels, self.problems)

    def worked_solutions(self, tokenizer: Tokenizer) -> list[TokenisedRecord]:
        given = (self.chosen_task, self.levels, self.solutions, self.seed, self.fast_every)
        return worked_solutions(*given, tokenizer, self.hurried)


def tune_supervised(
    folder: Path, report: Report, lesson: Lesson, train: TrainConfig, start: str, fresh: bool = False, samples: str = ""
) -> dict[str, Any]:
    """Fine-tune the model in `start` (random weights if `fresh`) on the worked solutions, or on the file `samples`.

    The best checkpoint on validation is `folder/best`.
    """
    tokenizer = Tokenizer.load(Path(start))
    model = _fresh(Path(start), lesson.seed) if fresh else load_model(Path(start), FP32)
    records = read_samples(Path(samples)) if samples else lesson.worked_solutions(tokenizer)
    best = Best(
        tokenizer, Start(Path(start)), Right(lesson.chosen_task), lesson.validation(), folder, lesson.max_tokens
    )
    best.begin_with(Path(start))
    done = finetune(model, records, train, folder, report, best)
    return {"value": best.value, "model": best.model_folder, **asdict(done), "rate": train.learning_rate}


def tune_reinforced(
    folder: Path, report: Report, lesson: Lesson, rl: ReinforceConfig, start: str, run: str, until: int | None = None
) -> dict[str, Any]:
    """Reinforce the model in `start`, in the run folder `run`; its best checkpoint on validation is `run/best`."""
    tokenizer, place = Tokenizer.load(Path(start)), Path(run)
    best = Best(tokenizer, Start(Path(start)), Right(lesson.chosen_task), lesson.validation(), place, lesson.max_tokens)
    best.begin_with(Path(start))
    done = reinforce(load_model(Path(start), FP32), tokenizer, lesson.chosen_task, rl, place, report, best, until)
    return {"value": best.value, "model": best.model_folder, **asdict(done), "rate": rl.learning_rate}


def draw_own_samples(
    folder: Path, report: Report, lesson: Lesson, rl: ReinforceConfig, start: str, drawn: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Draw the right answers of the model in `start` to the problems of RL; they are `folder/samples.json`."""
    model, tokenizer = load_model(Path(start), FP32), Tokenizer.load(Path(start))
    found = own_samples(model, tokenizer, lesson.chosen_task, rl, drawn, report)
    rows = [[list(record.tokens), list(record.weights)] for record in found.records]
    write_atomic(folder / "samples.json", json.dumps(rows))
    values = asdict(found)
    del values["records"]
    return {"samples": folder / "samples.json", "records": len(found.records), **values}


def _fresh(start: Path, seed: int) -> Decoder:
    return initialise(Decoder(with_dtype(read_config(start), FP32)), seed)


def read_samples(path: Path) -> list[TokenisedRecord]:
    return [TokenisedRecord(tuple(tokens), tuple(weights)) for tokens, weights in read_json(path)]


def measure(folder: Path, report: Report, lesson: Lesson, model: str, thinking: bool = True) -> dict[str, Any]:
    """Answer the test problems with the model in `model`; return its outcomes problem by problem."""
    engine = tuning_engine(load_model(Path(model)).eval(), lesson.max_tokens)
    problems = lesson.test()
    answers = measure_accuracy(
        engine,
        Tokenizer.load(Path(model)),
        Right(lesson.chosen_task),
        problems,
        lesson.samples,
        thinking,
        seed=lesson.seed,
        max_tokens=lesson.max_tokens,
        report=report,
    )
    shown = [
        {
            "question": problem.question,
            "answer": problem.answer,
            "thought": answers.thoughts[place],
            "text": answers.texts[place],
            "right": bool(answers.greedy[place]),
        }
        for place, problem in enumerate(problems[:SHOWN])
    ]
    return {
        "greedy": answers.greedy.astype(int).tolist(),
        "sampled": answers.sampled_mean.tolist(),
        "pass_at_8": answers.pass_at_k.astype(int).tolist(),
        "levels": answers.levels.tolist(),
        "thought_lengths": answers.thought_lengths.tolist(),
        "shown": shown,
    }

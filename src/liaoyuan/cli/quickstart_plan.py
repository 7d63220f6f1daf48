"""From `--minutes` to fixed numbers, once: what a quickstart run does, as `config.toml` in its folder holds it.

Shapes, steps and tokens are chosen from the speed measured here; from then on no clock influences a result, and a
resumed run reads the numbers and never measures again.
"""

import time
from pathlib import Path

import torch

from liaoyuan import config as configuration
from liaoyuan.cli.process import available_cores
from liaoyuan.config import Config, to_toml
from liaoyuan.data import Corpus, CorpusConfig
from liaoyuan.device import measure_gemm_rate, select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference import Request, SamplingParams
from liaoyuan.models import Decoder, initialise, with_dtype
from liaoyuan.models.config import DTYPES
from liaoyuan.rundir import Report, write_atomic
from liaoyuan.training.pretrain import PretrainConfig, model_config
from liaoyuan.training.sizing import choose_size, tokens_per_second
from liaoyuan.tuning import StudyConfig
from liaoyuan.tuning.controls import Prices
from liaoyuan.tuning.validation import tuning_engine

FILE = "config.toml"
VOCABULARY = 2048  # small: the tables of a small model are most of it, and every token of RL pays for the head
WORKERS = 2  # processes that teach at once, one thread each

# Seconds of the whole that are neither pretraining nor teaching: data, measuring speed, bits per byte, report.
FIXED_SECONDS = 45.0
# Teaching gets this share of the time; beyond the quickstart's ten minutes most of what is added goes to pretraining.
STUDY_SHARE, LONG_STUDY_SHARE, LONG_FROM = 0.7, 0.25, 600.0

# What teaching costs (measured: docs/notes/regime.md).
BUSY = 0.93  # share of the workers' time that is work, at the speed of a process alone
ANSWER_TOKENS = 24  # generated for one answer
TRAINED_TOKENS = 9  # rows trained for one rollout: half of the groups with signal
ANSWERS = 130_000  # test problems of all stages, and validations
STEP_MULTIPLE = 6.0  # RL, its trials, the run from random weights, and both controls with theirs, in steps of RL
MOST_STEPS, FEWEST_STEPS = 300, 4  # of RL

GENERATED = 24  # tokens of each of the sequences that are timed
UPDATED_ROWS = 1024  # of the update that is timed: a usual minibatch
ROLLOUT_EXTRAS = 1.2  # reading the questions, judging the answers, in generating


class Measured(Config):
    """What was measured on this machine before the first step; kept for the report."""

    gemm_flops: float  # FLOP/s of matrix products in the model's dtype, all threads
    training_rate: float  # tokens/s of a step of SFT with the chosen shape, one thread
    update_rate: float  # rows/s of an update of RL
    generation_rate: float  # tokens/s of rollouts with this shape, one thread


class QuickstartConfig(Config):
    """Everything that a quickstart run does."""

    minutes: float
    seeds: int
    text: str = ""  # "" is the Python standard library
    measured: Measured
    pretrain: PretrainConfig
    study: StudyConfig


def corpus_config(text: Path | None) -> CorpusConfig:
    """Return how the text is prepared; it does not depend on the time."""
    return CorpusConfig(text=text, vocab_size=VOCABULARY)


def resolve(
    folder: Path, corpus: Corpus, text: Path | None, minutes: float, seeds: int, report: Report
) -> QuickstartConfig:
    """Return the config of the run in `folder`: read it if it is there, else measure, choose and write it.

    Raises:
        LiaoyuanError: the folder holds a run with other minutes or another text.
    """
    path = folder / FILE
    source = str(text.resolve()) if text else ""
    if path.exists():
        found = configuration.load(QuickstartConfig, path)
        for name, wanted in (("minutes", minutes), ("text", source)):
            if getattr(found, name) != wanted:
                raise LiaoyuanError(
                    f"{folder} holds a run with --{name} {getattr(found, name) or '(the standard library)'}: "
                    f"give the same to go on with it, or choose another folder with --run."
                )
        config = found.model_copy(update={"seeds": seeds})
    else:
        config = _plan(corpus, source, minutes, seeds, report)
    write_atomic(path, to_toml(config))
    return config


def _plan(corpus: Corpus, source: str, minutes: float, seeds: int, report: Report) -> QuickstartConfig:
    seconds = 60.0 * minutes
    short = min(seconds, LONG_FROM)
    study_seconds = STUDY_SHARE * short + LONG_STUDY_SHARE * (seconds - short)
    pretrain_seconds = max(0.1 * seconds, seconds - study_seconds - FIXED_SECONDS)
    pretrain = choose_size(corpus.folder, pretrain_seconds, report=report)
    measured = _measure(corpus, pretrain)
    return QuickstartConfig(
        minutes=minutes,
        seeds=seeds,
        text=source,
        measured=measured,
        pretrain=pretrain,
        study=_study(study_seconds * BUSY * min(WORKERS, available_cores()), measured),
    )


def _measure(corpus: Corpus, pretrain: PretrainConfig) -> Measured:
    device = select_device(pretrain.device)
    shape = model_config(pretrain.model, corpus.tokenizer(), device)
    gemm = measure_gemm_rate(DTYPES[shape.dtype], device=str(device.torch))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = tokens_per_second(corpus, pretrain.model, StudyConfig().batch_tokens, device)
        updates = tokens_per_second(corpus, pretrain.model, UPDATED_ROWS, device, "adamw")
        generated = _generation_rate(initialise(Decoder(with_dtype(shape, torch.float32)), 0).to(device.torch))
    finally:
        torch.set_num_threads(threads)
    return Measured(gemm_flops=gemm, training_rate=rate, update_rate=updates, generation_rate=generated)


def _generation_rate(model: Decoder) -> float:
    """Time full batches of rollouts after a first one; return the speed of the fastest."""
    engine = tuning_engine(model.eval(), GENERATED)
    sampling = SamplingParams(max_tokens=GENERATED, temperature=1.0)
    requests = [Request(place, (1 + place // 8,) * 12, sampling) for place in range(engine.config.max_sequences)]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        engine.generate(requests)
        seconds.append(time.perf_counter() - start)
    return len(requests) * GENERATED / min(seconds[1:])


def _study(seconds: float, measured: Measured) -> StudyConfig:
    """Return the study that takes about `seconds` of one thread."""
    whole = StudyConfig()
    train, update = 1.0 / measured.training_rate, 1.0 / measured.update_rate
    generate = ROLLOUT_EXTRAS / measured.generation_rate
    supervised = 2 * whole.sft_steps * whole.batch_tokens * train  # also from random weights
    left = seconds - ANSWERS * ANSWER_TOKENS * generate
    step = whole.rl.problems * whole.rl.group * (ANSWER_TOKENS * generate + TRAINED_TOKENS * update)
    steps = max(FEWEST_STEPS, min(MOST_STEPS, int((left - supervised) / (STEP_MULTIPLE * step))))
    share = min(1.0, max(0.05, left / supervised))  # too little time: SFT is cut too
    rl = whole.rl.model_copy(update={"steps": steps, "validate_every": max(1, steps // 8)})
    return whole.model_copy(
        update={
            "sft_steps": max(10, round(share * whole.sft_steps)),
            "rl": rl,
            "prices": Prices(generated=round(generate / train, 3), updated=round(update / train, 3)),
            "workers": min(WORKERS, available_cores()),
        }
    )

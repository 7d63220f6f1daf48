"""From seconds to fixed numbers: the shape of the model, the batch and the steps that fit this machine.

Each shape of a ladder is timed for a few steps; a scaling law then says which of them reaches the lowest loss with
the tokens it can see in the time. The result holds no clock: a resumed run reads it and never measures again.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liaoyuan.data import Corpus, TokenBatches, load_corpus
from liaoyuan.device import Device, select_device
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, initialise
from liaoyuan.parallel import Program, World
from liaoyuan.rundir import Progress, Report, silent
from liaoyuan.training.loop import TrainConfig, make_optimiser, take_step
from liaoyuan.training.pretrain import PretrainConfig, ShapeConfig, model_config


@dataclass(frozen=True)
class Rung:
    """One shape of the ladder; heads of `head_dim`, two query heads for each key-value head."""

    hidden_size: int
    num_hidden_layers: int
    head_dim: int = 32

    @property
    def shape(self) -> ShapeConfig:
        heads = self.hidden_size // self.head_dim
        return ShapeConfig(
            hidden_size=self.hidden_size,
            intermediate_size=round(self.hidden_size * 8 / 3 / 64) * 64,  # Shazeer 2020: three matrices for two
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=self.head_dim,
        )


LADDER = (Rung(128, 4), Rung(192, 5), Rung(256, 6), Rung(384, 8, 64), Rung(512, 8, 64), Rung(768, 12, 64))
SEQUENCE_LENGTH = 256
TIMED_STEPS, FIRST_STEPS = 7, 3  # the first steps compile kernels and fault memory in
QUARTILE = 2  # of the timed steps, the fastest first: neighbours on the machine only ever slow a step down
RESERVE = 0.92  # share of the seconds that steps may take; the rest is evaluation and checkpoints
TOKENS_PER_STEP = (2048, 4096, 8192, 16384, 32768, 65536)
STEPS_WANTED = 6000  # the batch doubles once a run would take more steps; small batches learn more per token

OPTIMISER: Literal["adamw", "muon"] = "muon"
LEARNING_RATE = 8e-3  # measured in docs/notes/pretraining.md

# Bits per byte above the constant of the text, A / N^ALPHA + B / D^BETA, with N million weights outside the tables
# and D million tokens seen: the law of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 10) with its exponents; A and B
# from runs at this scale (docs/notes/pretraining.md). Only its minimum over the ladder matters.
ALPHA, BETA, A, B = 0.34, 0.28, 0.3, 1.5
REPEATS_WORTH = 15.4  # repeats of the text after which more are worth little: Muennighoff et al. 2023, eq. 5


def choose_size(
    corpus: Path,
    seconds: float,
    device: str = "auto",
    report: Report = silent,
    ladder: Sequence[Rung] = LADDER,
    measure: Callable[[ShapeConfig, int], float] | None = None,
) -> PretrainConfig:
    """Return the run that reaches the lowest loss on the corpus in about `seconds` of this machine's time.

    `measure(shape, batch_tokens)` gives tokens per second; it is replaced in tests, since a clock is no oracle.
    """
    if seconds <= 0:
        raise LiaoyuanError(f"Pretraining needs a time above 0 seconds (it is {seconds:g}).")
    source, place = load_corpus(corpus), select_device(device)
    timed = measure or (lambda shape, batch: tokens_per_second(source, shape, batch, place))
    unique = len(source.stream("train").tokens)
    best: tuple[float, PretrainConfig] | None = None
    for index, rung in enumerate(ladder):
        rate = timed(rung.shape, TOKENS_PER_STEP[0])
        told = f"width {rung.hidden_size}, {rung.num_hidden_layers} layers: {rate:,.0f} tokens/s"
        report(Progress(index + 1, len(ladder), "shape", told))
        tokens = seconds * RESERVE * rate
        weights = model_config(rung.shape, source.tokenizer(), place).num_parameters(embedding=False)
        loss = predicted_loss(weights, tokens, unique)
        if best is not None and loss >= best[0]:
            break  # larger shapes are slower still
        run = PretrainConfig(
            corpus=corpus,
            model=rung.shape,
            train=settings_for(tokens),
            sequence_length=SEQUENCE_LENGTH,
            device=device,
        )
        best = loss, run
    assert best is not None
    return best[1]


def predicted_loss(weights: float, tokens: float, unique: float) -> float:
    """Return the law's bits per byte above the text's constant, for `tokens` seen of a text of `unique` tokens."""
    repeats = max(0.0, tokens / unique - 1)
    worth = min(tokens, unique) + unique * REPEATS_WORTH * (1 - math.exp(-repeats / REPEATS_WORTH))
    return A / (weights / 1e6) ** ALPHA + B / (worth / 1e6) ** BETA


def tokens_per_second(
    corpus: Corpus,
    shape: ShapeConfig,
    batch_tokens: int,
    device: Device,
    optimiser_name: Literal["adamw", "muon"] = OPTIMISER,
) -> float:
    """Time a few training steps of this shape on the corpus; return the speed that the faster ones have."""
    model = initialise(Decoder(model_config(shape, corpus.tokenizer(), device)), 0).to(device.torch)
    settings = TrainConfig(steps=1, optimiser=optimiser_name)
    optimiser = make_optimiser(model, settings)
    batches = TokenBatches(corpus.stream("train"), 0, batch_tokens, SEQUENCE_LENGTH)
    seconds = []
    for step in range(FIRST_STEPS + TIMED_STEPS):
        device.synchronize()
        start = time.perf_counter()
        take_step(Program([model]), optimiser, batches(step), 1e-4, 1.0, World())
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return batch_tokens / sorted(seconds[FIRST_STEPS:])[QUARTILE - 1]


def settings_for(tokens: float) -> TrainConfig:
    """Return the run over about `tokens` tokens: the smallest batch whose steps are not too many."""
    batch = next((size for size in TOKENS_PER_STEP if tokens / size <= STEPS_WANTED), TOKENS_PER_STEP[-1])
    steps = max(1, round(tokens / batch))
    return TrainConfig(
        steps=steps,
        batch_tokens=batch,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(20, steps // 10),
        optimiser=OPTIMISER,
        checkpoint_every=max(20, steps // 20),
        evaluate_every=max(1, steps // 8),
    )

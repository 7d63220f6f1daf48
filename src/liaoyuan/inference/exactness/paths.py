"""The ways to compute log-probabilities that exact mode compares: training's forward, and all that the engine does.

Every path is given the same probes and returns what it found of them; what it does not compute it leaves open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from liaoyuan.errors import LiaoyuanError
from liaoyuan.inference.engine import Engine
from liaoyuan.inference.exactness.subject import Subject
from liaoyuan.inference.request import Completion, Request, SamplingParams
from liaoyuan.inference.sequence import Sequence as Running

SEED = 20_000  # of the samples of the first probe
CHUNKS = 32  # of a prompt at most
SMALL_BLOCK = 4  # of the cache, where sequences are to outgrow it
SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)  # of the cache that all would need, until somebody is preempted


@dataclass(frozen=True)
class Extent:
    """How much is computed for a proof.

    lengths: of the prompts; tokens: by which each is continued; batches, chunks: how many sequences, and tokens of a
    prompt, are computed at once; threads: numbers of them (none: as it is); stride: with threads other than the first
    number every so many-th prompt is computed.
    """

    lengths: tuple[int, ...]
    tokens: int
    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    threads: tuple[int, ...] = ()
    stride: int = 1


# Lengths around the kernels' sizes: a register's lanes, a cache block, a tile, 512 keys between rescalings.
FULL = Extent(
    lengths=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 16, 17, 19, 23, 24, 25, 29, 31, 32, 33, 41, 48, 49, 63, 64, 65,
             100, 129, 530),
    tokens=10, batches=(8, 32), chunks=(1, 7, 16, 33, 100), threads=(1, 2), stride=3,
)  # fmt: skip
QUICK = Extent(lengths=(1, 15, 16, 17, 40), tokens=10, batches=(5,), chunks=(7,))


@dataclass(frozen=True)
class Probe:
    """A prompt, the tokens that follow it, and the seed with which these were drawn."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    seed: int

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)


Found = list[np.ndarray]  # of each probe: fp32, the log-probability of every token after the first; nan: not computed


@dataclass(frozen=True)
class Path:
    """A way to compute the log-probabilities of probes; a run raises `NotMetError` if it was not gone.

    learns: it is training's forward.
    """

    name: str
    run: Callable[[Subject, Sequence[Probe]], Found]
    learns: bool = False


class NotMetError(LiaoyuanError):
    """What a path is about did not happen: nobody was preempted, or nothing was found in the cache."""


def draw_probes(subject: Subject, extent: Extent) -> list[Probe]:
    """Return prompts of random tokens with what the engine samples after them, one request at a time.

    No two prompts have a token at the same place, if the vocabulary is large enough.

    Raises:
        LiaoyuanError: the model's context is too short.
    """
    room = subject.model.config.max_position_embeddings - extent.tokens
    lengths = sorted({length for length in extent.lengths if length <= room})
    if not lengths:
        raise LiaoyuanError(f"A proof needs a context of {extent.tokens + 1} tokens, but the model has {room}.")
    vocabulary = subject.model.config.vocab_size
    base = np.random.default_rng(0).integers(0, vocabulary, max(lengths))
    prompts = [tuple(((base[:length] + place) % vocabulary).tolist()) for place, length in enumerate(lengths)]
    probes = [Probe(prompt, (0,) * extent.tokens, SEED + place) for place, prompt in enumerate(prompts)]
    engine = subject.engine(max_sequences=1)
    drawn = [engine.generate([_request(probe)])[0] for probe in probes]
    return [replace(probe, tokens=tuple(one.tokens)) for probe, one in zip(probes, drawn, strict=True)]


def paths_of(extent: Extent) -> list[Path]:
    """Return all paths, in the order in which they build on each other."""
    paths = [
        Path("training, packed", lambda subject, probes: teacher_forcing(subject, probes, False, learns=True), True),
        Path("scoring, alone", lambda subject, probes: teacher_forcing(subject, probes, True, learns=False)),
        Path("prefill, alone", _prefill),
        Path(f"prefill, {len(extent.lengths)} prompts at once", _prefill_together),
    ]
    paths += [Path(f"prefill in chunks of {size}", _in_chunks(size)) for size in extent.chunks]
    paths += [Path("decode, alone", decode(1))]
    paths += [Path(f"decode, batches of {size}", decode(size)) for size in extent.batches]
    return [*paths, Path("prefill and decode in one step", _mixed), Path("prefix hit", _prefix_hit),
            Path("after preemption", _preempted), Path("speculation", _speculation)]  # fmt: skip


def teacher_forcing(subject: Subject, probes: Sequence[Probe], alone: bool, learns: bool) -> Found:
    """Return log-probabilities of training's forward, or without gradients of scoring's, if it does not learn."""
    texts = [probe.text for probe in probes]
    if alone:
        return [found for text in texts for found in subject.score([text], learns)]
    return subject.score(texts, learns)


def _request(probe: Probe, name: int = 0, scored: bool = True) -> Request:
    sampling = SamplingParams(max_tokens=len(probe.tokens), seed=probe.seed, prompt_logprobs=0 if scored else None)
    return Request(name, probe.prompt, sampling)


def _as_prompt(probe: Probe) -> Probe:
    """Return the probe with all but its last token as the prompt."""
    return replace(probe, prompt=probe.text[:-1], tokens=probe.text[-1:])


def _generate(engine: Engine, probes: Sequence[Probe], scored: bool = True, keep_prefixes: bool = False) -> Found:
    requests = [_request(probe, place, scored) for place, probe in enumerate(probes)]
    completions = engine.generate(requests, keep_prefixes=keep_prefixes)
    return [_found(probe, one) for probe, one in zip(probes, completions, strict=True)]


def _found(probe: Probe, completion: Completion) -> np.ndarray:
    """Return what a completion says of its probe. A token that is not the probe's has no log-probability of it, so it
    counts as a difference, and what follows it is left open."""
    values = np.full(len(probe.text) - 1, np.nan, dtype=np.float32)
    start = len(probe.prompt) - 1
    if completion.prompt:
        values[:start] = completion.prompt.logprobs
    for place, (token, log_prob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        values[start + place] = log_prob if token == probe.tokens[place] else np.inf
        if token != probe.tokens[place]:
            break
    return values


def _prefill(subject: Subject, probes: Sequence[Probe]) -> Found:
    engine = subject.engine(max_sequences=1)
    return [_generate(engine, [_as_prompt(probe)])[0] for probe in probes]


def _prefill_together(subject: Subject, probes: Sequence[Probe]) -> Found:
    return _generate(subject.engine(max_sequences=64), [_as_prompt(probe) for probe in probes])


def _in_chunks(size: int) -> Callable[[Subject, Sequence[Probe]], Found]:
    """Prompts of so many chunks at most: more steps of few tokens would take long and show nothing new."""

    def run(subject: Subject, probes: Sequence[Probe]) -> Found:
        engine = subject.engine(max_sequences=1, max_batch_tokens=size)
        chosen = [probe for probe in probes if len(probe.text) <= CHUNKS * size]
        left = [np.full(len(probe.text) - 1, np.nan, dtype=np.float32) for probe in probes[len(chosen) :]]
        return _generate(engine, [_as_prompt(probe) for probe in chosen]) + left

    return run


def decode(batch: int) -> Callable[[Subject, Sequence[Probe]], Found]:
    """Return the way that continues so many prompts at a time."""

    def run(subject: Subject, probes: Sequence[Probe]) -> Found:
        engine = subject.engine(max_sequences=batch)
        parts = [probes[start : start + batch] for start in range(0, len(probes), batch)]
        return [found for part in parts for found in _generate(engine, part)]

    return run


def _mixed(subject: Subject, probes: Sequence[Probe]) -> Found:
    """Few places and a small budget: who decodes shares every step with whose prompt is still being read."""
    return _generate(subject.engine(max_sequences=4, max_batch_tokens=24), probes)


def _prefix_hit(subject: Subject, probes: Sequence[Probe]) -> Found:
    """The same prompts again, when the cache has them; without their own log-probabilities, which nobody computes."""
    engine = subject.engine(max_sequences=64)
    _generate(engine, probes, scored=False)
    found = _generate(engine, probes, scored=False, keep_prefixes=True)
    if not engine.statistics()["prefix_hit_tokens"]:
        raise NotMetError("nothing was found in the cache")
    return found


def _preempted(subject: Subject, probes: Sequence[Probe]) -> Found:
    """A cache that all cannot grow in: some give way, and are computed again when there is room."""
    needed = sum(-(-len(probe.text) // SMALL_BLOCK) for probe in probes)
    longest = max(-(-len(probe.text) // SMALL_BLOCK) for probe in probes)
    for share in SHARES:
        tokens = SMALL_BLOCK * max(longest, int(share * needed))
        engine = subject.engine(max_sequences=64, block_size=SMALL_BLOCK, cache_tokens=tokens)
        found = _generate(engine, probes)
        if engine.statistics()["preemptions"]:
            return found
    raise NotMetError("nobody was preempted")


def _speculation(subject: Subject, probes: Sequence[Probe]) -> Found:
    """The model guesses for itself, so that guesses are right and many tokens come in one step; over several processes
    somebody who knows the tokens guesses."""
    engine = subject.engine(_Known(probes) if subject.leader else subject.model, max_sequences=4)
    found = _generate(engine, probes)
    if not engine.statistics()["guessed_right"]:
        raise NotMetError("no guess was right")
    return found


class _Known:
    """A `speculation.Drafter` that knows what will come."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._texts, self._of_slot = [np.array(probe.text) for probe in probes], dict[int, np.ndarray]()

    def start(self, sequence: Running) -> None:
        self._of_slot[sequence.slot] = self._texts[int(sequence.request.id)]

    def drop(self) -> None:
        """There is nothing to spare."""

    def guess(self, slots: np.ndarray, lengths: np.ndarray, most: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        found = np.zeros(len(slots), dtype=np.int64)
        for place, (slot, length, count) in enumerate(zip(slots, lengths, most, strict=True)):
            guesses = self._of_slot[int(slot)][length : length + count]
            tokens[slot, length : length + len(guesses)] = guesses
            found[place] = len(guesses)
        return found

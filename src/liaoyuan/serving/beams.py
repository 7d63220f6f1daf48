"""Beam search: of all continuations the most probable, looked for a few at a time.

Graves 2012, "Sequence transduction with recurrent neural networks" (arXiv 1211.3711), sec. 2.5; scores are divided by
a power of the length as in Wu et al. 2016 (arXiv 1609.08144), sec. 7, in the plainer form that vLLM and transformers
use. Each step asks the engine for one token after each beam; the prefix cache keeps what is common to them.
"""

import asyncio
from dataclasses import dataclass, replace
from functools import partial

from liaoyuan.inference import Event
from liaoyuan.inference.request import TopLogprobs
from liaoyuan.serving.completion_body import CompletionRequest
from liaoyuan.serving.errors import ApiError, invalid
from liaoyuan.serving.generation import Job, Served, engine_events
from liaoyuan.serving.structure import asked_grammar
from liaoyuan.serving.text import AnswerReader, Piece

# What would change which continuation is the most probable, and is not asked of the engine here.
OTHERWISE = (
    "allowed_token_ids",
    "bad_words",
    "best_of",
    "frequency_penalty",
    "logit_bias",
    "logprob_token_ids",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "stream",
)


@dataclass(frozen=True)
class Beam:
    """A continuation: its tokens, each with its log-probability and its rivals, and why it ended, if it did."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    rivals: tuple[TopLogprobs, ...] = ()
    finish_reason: str | None = None

    def score(self, length_penalty: float) -> float:
        """Return how good it is: its log-probability by a power of its length."""
        return sum(self.logprobs) / max(1, len(self.tokens)) ** length_penalty


def check_beams(body: CompletionRequest) -> None:
    """Raise ApiError if a request asks for beams and for what they cannot have."""
    form = asked_grammar(body)
    wrong = form[0] if form else next((name for name in OTHERWISE if getattr(body, name)), None)
    if wrong:
        raise invalid(f"Beam search goes by the model's own probabilities, at once: it cannot have '{wrong}'.", wrong)


async def beam_search(served: Served, job: Job, width: int, length_penalty: float) -> list[list[Piece]]:
    """Return the best `width` continuations of a job's prompt, the best first, each as the pieces of an answer."""
    beams, done = [Beam()], list[Beam]()
    for _ in range(job.sampling.max_tokens or 1):
        tops = await asyncio.gather(*(_next(served, job, beam, width) for beam in beams))
        longer = [_longer(beam, *one, top) for beam, top in zip(beams, tops, strict=True) for one in top]
        longer.sort(key=lambda beam: -sum(beam.logprobs))
        beams = []
        for beam in longer:
            if beam.tokens[-1] in job.sampling.stop_token_ids:
                done.append(replace(beam, finish_reason="stop"))
            else:
                beams.append(beam)
            if len(beams) == width:
                break
        done = sorted(done, key=lambda beam: -beam.score(length_penalty))[:width]
        if len(done) == width and (not beams or done[-1].score(length_penalty) >= beams[0].score(length_penalty)):
            break
    done += [replace(beam, finish_reason="length") for beam in beams]
    best = sorted(done, key=lambda beam: -beam.score(length_penalty))[:width]
    return [_pieces(served, job, beam) for beam in best]


async def _next(served: Served, job: Job, beam: Beam, width: int) -> TopLogprobs:
    """Return the tokens that may come after a beam: twice as many as there are beams, since some end them."""
    count = 2 * width
    sampling = replace(job.sampling, max_tokens=1, temperature=0.0, top_logprobs=max(count, job.sampling.top_logprobs))
    request = replace(job, prompt=(*job.prompt, *beam.tokens), sampling=sampling).request()
    async for event in engine_events(served, request):
        if event.top_logprobs:
            return event.top_logprobs[0][:count]
    raise ApiError(504, "The beams did not end in time.", code="timeout")


def _longer(beam: Beam, token: int, logprob: float, rivals: TopLogprobs) -> Beam:
    return Beam((*beam.tokens, token), (*beam.logprobs, logprob), (*beam.rivals, rivals))


def _pieces(served: Served, job: Job, beam: Beam) -> list[Piece]:
    decoder = partial(served.decoder, job.shown, job.continuing)
    reader = AnswerReader(decoder, job.stops, job.sampling.stop_token_ids)
    most = job.sampling.top_logprobs
    tops = [rivals[:most] for rivals in beam.rivals]
    return [reader.read(Event("", [*beam.tokens], [*beam.logprobs], beam.finish_reason, tops))]

"""Requests of a trace, served: by replicas that do all, or by some that compute prompts and others that generate."""

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.compute.plan.serving.asks import Ask
from liaoyuan.compute.plan.serving.replica import Answer, Replica

PERCENTILES = (50, 90, 99)
# As in `serving/routing.py`: by how many requests, or what part of those of the least busy replica, one may be busier
# for the sake of its prefix cache; and the shortest beginning of a prompt that is known again, in tokens.
SLACK, RELATIVE_SLACK, PIECE = 4, 0.5, 64


@dataclass(frozen=True)
class Times:
    """Seconds of many: their mean and percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: np.ndarray) -> "Times":
        if not len(values):
            return Times(*[math.nan] * 4)
        return Times(float(values.mean()), *np.percentile(values, PERCENTILES).tolist())


@dataclass(frozen=True)
class Outcome:
    """What a trace meets. first_token, between_tokens, whole: seconds until the first token of an answer, between two
    of its tokens, and until the last. seconds: from the first arrival to the last token. throughput: generated tokens a
    second. refused: requests that could never fit. peak_blocks: held at most in one replica, of `blocks`.
    busy: share of the time that the busiest replica computed. preemptions: how often a request gave way to another.
    """

    requests: int
    refused: int
    seconds: float
    generated: int
    prompt_tokens: int
    cached_tokens: int
    first_token: Times
    between_tokens: Times
    whole: Times
    throughput: float
    steps: int
    busy: float
    blocks: int
    peak_blocks: int
    preemptions: int


def serve(asks: Sequence[Ask], replicas: Sequence[Replica]) -> Outcome:
    """Return what becomes of requests, each of which some replica gets when it comes: of those not much busier than the
    least busy one, one that was given the request's prefix before.
    """
    answers = [Answer(ask, number) for number, ask in enumerate(asks)]
    given = set[tuple[str, int]]()
    for answer in answers:
        for replica in replicas:
            replica.advance(answer.ask.arrival)
        number = _chosen(answer.ask, [replica.open for replica in replicas], given)
        replicas[number].submit(answer)
        given.add((answer.ask.prefix, number))
    for replica in replicas:
        replica.advance(math.inf)
    return told(answers, replicas)


def serve_apart(
    asks: Sequence[Ask],
    prefill: Sequence[Replica],
    decode: Sequence[Replica],
    hand_over: Callable[[int], float],
) -> Outcome:
    """Return what becomes of requests whose prompts some replicas compute, and whose answers others generate.

    hand_over: seconds that keys and values of so many tokens are under way. As in `inference.disaggregation`, the
    prompt's full blocks go over, and the rest is computed where the answer is generated.
    """
    prompts = [Answer(_prompt_alone(ask), number) for number, ask in enumerate(asks)]
    ready = list[tuple[float, int]]()
    for answer in prompts:
        for replica in prefill:
            ready += [(one.last, one.number) for one in replica.advance(answer.ask.arrival)]
        _least_busy(prefill, lambda replica: replica.waiting_tokens).submit(answer)
    for replica in prefill:
        ready += [(one.last, one.number) for one in replica.advance(math.inf)]
    coming = [(when + hand_over(asks[number].prompt_tokens), number) for when, number in ready]
    answers = [Answer(ask, number) for number, ask in enumerate(asks)]
    heapq.heapify(coming)
    while coming:
        when, number = heapq.heappop(coming)
        for replica in decode:
            replica.advance(when)
        _least_busy(decode, lambda replica: replica.open).submit(answers[number], known=True)
    for replica in decode:
        replica.advance(math.inf)
    for prompt, answer in zip(prompts, answers, strict=True):
        answer.refused |= prompt.refused
        answer.cached = prompt.cached
    return told(answers, [*prefill, *decode], decode)


def told(answers: Sequence[Answer], replicas: Sequence[Replica], generating: Sequence[Replica] = ()) -> Outcome:
    """Return the figures of answers; generating: the replicas in which answers are generated, if not all."""
    done = [one for one in answers if not one.refused]
    arrivals = np.array([one.ask.arrival for one in done])
    firsts, lasts = np.array([one.first for one in done]), np.array([one.last for one in done])
    begin, end = (float(arrivals.min()), float(lasts.max())) if done else (0.0, 0.0)
    generated = sum(one.ask.output_tokens for one in done)
    gaps = [gap for replica in generating or replicas for gap in replica.gaps]
    fullest = max(generating or replicas, key=lambda replica: replica.peak / replica.blocks)
    return Outcome(
        len(answers),
        len(answers) - len(done),
        end - begin,
        generated,
        sum(one.ask.prompt_tokens for one in done),
        sum(one.cached for one in done),
        Times.of(firsts - arrivals),
        Times.of(np.concatenate(gaps) if gaps else np.empty(0)),
        Times.of(lasts - arrivals),
        generated / (end - begin) if end > begin else math.nan,
        sum(replica.steps for replica in replicas),
        max(replica.busy for replica in replicas) / (end - begin) if end > begin else 0.0,
        fullest.blocks,
        fullest.peak,
        sum(replica.preemptions for replica in replicas),
    )


def _chosen(ask: Ask, busy: Sequence[int], given: Collection[tuple[str, int]]) -> int:
    least = min(busy)
    near = [number for number, count in enumerate(busy) if count <= least + max(SLACK, least * RELATIVE_SLACK)]
    knows = ask.prefix_tokens >= PIECE
    return min(near, key=lambda number: (not (knows and (ask.prefix, number) in given), busy[number], number))


def _prompt_alone(ask: Ask) -> Ask:
    return Ask(ask.arrival, ask.prompt_tokens, 1, ask.prefix, ask.prefix_tokens)


def _least_busy(replicas: Sequence[Replica], load: Callable[[Replica], int]) -> Replica:
    return min(replicas, key=load)

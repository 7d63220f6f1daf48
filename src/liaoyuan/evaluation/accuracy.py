"""Accuracy on problems with checkable answers: greedy, sampled, and right in at least one of k samples (pass@k)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from liaoyuan.data import Tokenizer
from liaoyuan.inference import Completion, Engine, Request, SamplingParams
from liaoyuan.rundir import Report, silent
from liaoyuan.tasks import Problem, Reward, Rollout, Score, score_all

MAX_TOKENS = 128  # of one answer, its thought included


@dataclass(frozen=True)
class Answers:
    """What a model answered to P problems, K times each beside the greedy answer, and what that was worth.

    greedy, greedy_judged: bool [P], whether it is right, and whether that could be said; sampled, sampled_judged: the
        same of the samples at temperature 1, [P, K]. What could not be judged is not right.
    levels: int [P]. thought_lengths: int [P], tokens of the greedy thought; thoughts and texts: the greedy thoughts
        and answers. rollouts and scores: of the greedy answers; sampled_rollouts and sampled_scores: P * K.
    """

    greedy: np.ndarray
    sampled: np.ndarray
    levels: np.ndarray
    thought_lengths: np.ndarray
    thoughts: list[str]
    texts: list[str]
    greedy_judged: np.ndarray
    sampled_judged: np.ndarray
    rollouts: list[Rollout]
    scores: list[Score]
    sampled_rollouts: list[Rollout]
    sampled_scores: list[Score]

    @property
    def sampled_mean(self) -> np.ndarray:
        """Share of right samples of each problem, [P]."""
        return np.asarray(self.sampled.mean(1))

    @property
    def pass_at_k(self) -> np.ndarray:
        """Whether any sample of a problem is right, [P]."""
        return np.asarray(self.sampled.any(1))


def measure_accuracy(
    engine: Engine,
    tokenizer: Tokenizer,
    reward: Reward,
    problems: Sequence[Problem],
    samples: int = 8,
    thinking: bool = True,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    report: Report = silent,
    sampling: SamplingParams | None = None,
) -> Answers:
    """Answer each problem once greedily and `samples` times at temperature 1 (nothing filtered), and judge.

    reward: says what is right, see `tasks.Right`. sampling: further settings, see `completions_of`.
    """
    settings = (thinking, seed, max_tokens, report, sampling)
    rollouts, sampled_rollouts = (
        [
            read_rollout(tokenizer, problems[place // count], completion, thinking)
            for place, completion in enumerate(
                completions_of(engine, tokenizer, problems, count, temperature, *settings)
            )
        ]
        for count, temperature in ((1, 0.0), (samples, 1.0))
    )
    scores, sampled_scores = (score_all([reward], some)[0] for some in (rollouts, sampled_rollouts))
    shape = (len(problems), samples)
    return Answers(
        greedy=np.array([score.is_right for score in scores], dtype=bool),
        sampled=np.array([score.is_right for score in sampled_scores], dtype=bool).reshape(shape),
        levels=np.array([problem.level for problem in problems]),
        thought_lengths=np.array([rollout.thought_length for rollout in rollouts]),
        thoughts=[rollout.thought for rollout in rollouts],
        texts=[rollout.text for rollout in rollouts],
        greedy_judged=np.array([score.value is not None for score in scores], dtype=bool),
        sampled_judged=np.array([score.value is not None for score in sampled_scores], dtype=bool).reshape(shape),
        rollouts=rollouts,
        scores=scores,
        sampled_rollouts=sampled_rollouts,
        sampled_scores=sampled_scores,
    )


def completions_of(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    samples: int,
    temperature: float,
    thinking: bool = True,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    report: Report = silent,
    sampling: SamplingParams | None = None,
    first: int = 0,
) -> list[Completion]:
    """Return `samples` completions of each problem, one problem's after another's; a function of the seed.

    sampling: further settings of how tokens are drawn; none are filtered if None. first: how many problems come before
        these ones, whose completions are then those that they have among all.
    """
    further = sampling or SamplingParams()
    requests = []
    for place, problem in enumerate(problems, first):
        prompt = prompt_of(tokenizer, problem, thinking)
        for sample in range(samples):
            own = replace(
                further,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=(seed * 1_000_003 + place) * 4096 + sample,
                stop_token_ids=tokenizer.eos_ids,
            )
            requests.append(Request(place * samples + sample, prompt, own))
    return engine.generate(requests, report)


def prompt_of(tokenizer: Tokenizer, problem: Problem, thinking: bool = True) -> tuple[int, ...]:
    """Return the chat prompt that asks for a slow answer, or for a fast one."""
    return tuple(tokenizer.render([{"role": "user", "content": problem.question}], thinking))


def read_rollout(tokenizer: Tokenizer, problem: Problem, answer: Completion, thinking: bool = True) -> Rollout:
    """Return a completion as rewards read it; a whole one ends its turn and closes its thought once."""
    tokens, flaw = list(answer.tokens), ""
    thought, text = split_thought(tokenizer, tokens, thinking)
    if not tokens or tokens[-1] not in tokenizer.eos_ids:
        flaw = "cut off"
    elif thinking and tokenizer.think_ids and tokens.count(tokenizer.think_ids[1]) != 1:
        flaw = "its thought does not end once"
    else:
        text = text[:-1]
    # A special token inside the answer is not passed over.
    thought_text, answer_text = (tokenizer.decode(part, skip_special=False) for part in (thought, text))
    return Rollout(problem, thought_text, answer_text, flaw, len(tokens), len(thought))


def split_thought(tokenizer: Tokenizer, tokens: Sequence[int], thinking: bool = True) -> tuple[list[int], list[int]]:
    """Return the tokens of the thought and of the answer; a thought that is never closed leaves no answer."""
    if not thinking or tokenizer.think_ids is None:
        return [], list(tokens)
    close = tokenizer.think_ids[1]
    if close not in tokens:
        return list(tokens), []
    place = list(tokens).index(close)
    return list(tokens[:place]), list(tokens[place + 1 :])

"""Accuracy on problems with checkable answers: greedy, sampled, and right in at least one of k samples (pass@k)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liaoyuan.data import Tokenizer
from liaoyuan.inference import Completion, Engine, Request, SamplingParams
from liaoyuan.rundir import Report, silent
from liaoyuan.tasks import Problem, find_task

MAX_TOKENS = 128  # of one answer, its thought included


@dataclass(frozen=True)
class Answers:
    """What a model answered to P problems.

    greedy: bool [P]; sampled: bool [P, K], K answers at temperature 1; levels: int [P].
    thought_lengths: int [P], tokens of the greedy thought; thoughts and texts: the greedy thoughts and answers.
    """

    greedy: np.ndarray
    sampled: np.ndarray
    levels: np.ndarray
    thought_lengths: np.ndarray
    thoughts: list[str]
    texts: list[str]

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
    problems: Sequence[Problem],
    samples: int = 8,
    thinking: bool = True,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    report: Report = silent,
) -> Answers:
    """Answer each problem once greedily and `samples` times at temperature 1 (nothing filtered), and judge."""
    greedy = completions_of(engine, tokenizer, problems, 1, 0.0, thinking, seed, max_tokens, report)
    sampled = completions_of(engine, tokenizer, problems, samples, 1.0, thinking, seed, max_tokens, report)
    parts = [split_thought(tokenizer, completion.tokens, thinking) for completion in greedy]
    right = [judge(tokenizer, problem, one.tokens, thinking) for problem, one in zip(problems, greedy, strict=True)]
    repeated = [problem for problem in problems for _ in range(samples)]
    verdicts = [judge(tokenizer, problem, one.tokens, thinking) for problem, one in zip(repeated, sampled, strict=True)]
    return Answers(
        greedy=np.array(right, dtype=bool),
        sampled=np.array(verdicts, dtype=bool).reshape(len(problems), samples),
        levels=np.array([problem.level for problem in problems]),
        thought_lengths=np.array([len(thought) for thought, _ in parts]),
        thoughts=[tokenizer.decode(thought) for thought, _ in parts],
        texts=[tokenizer.decode(answer) for _, answer in parts],
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
) -> list[Completion]:
    """Return `samples` completions of each problem, one problem's after another's; a function of the seed."""
    requests = []
    for place, problem in enumerate(problems):
        prompt = prompt_of(tokenizer, problem, thinking)
        for sample in range(samples):
            sampling = SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=(seed * 1_000_003 + place) * 4096 + sample,
                stop_token_ids=tokenizer.eos_ids,
            )
            requests.append(Request(place * samples + sample, prompt, sampling))
    return engine.generate(requests, report)


def prompt_of(tokenizer: Tokenizer, problem: Problem, thinking: bool = True) -> tuple[int, ...]:
    """Return the chat prompt that asks for a slow answer, or for a fast one."""
    return tuple(tokenizer.render([{"role": "user", "content": problem.question}], thinking))


def judge(tokenizer: Tokenizer, problem: Problem, tokens: Sequence[int], thinking: bool = True) -> bool:
    """Return whether a completion is right: it ends its turn, closes its thought once, and the answer checks."""
    if not tokens or tokens[-1] not in tokenizer.eos_ids:
        return False
    if thinking and tokenizer.think_ids and list(tokens).count(tokenizer.think_ids[1]) != 1:
        return False
    _, answer = split_thought(tokenizer, tokens, thinking)
    text = tokenizer.decode(answer[:-1], skip_special=False)  # a special token inside the answer is not passed over
    return find_task(problem.task).check(problem, text)


def split_thought(tokenizer: Tokenizer, tokens: Sequence[int], thinking: bool = True) -> tuple[list[int], list[int]]:
    """Return the tokens of the thought and of the answer; a thought that is never closed leaves no answer."""
    if not thinking or tokenizer.think_ids is None:
        return [], list(tokens)
    close = tokenizer.think_ids[1]
    if close not in tokens:
        return list(tokens), []
    place = list(tokens).index(close)
    return list(tokens[:place]), list(tokens[place + 1 :])

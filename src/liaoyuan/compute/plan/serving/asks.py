"""What is asked of a server, and when: a trace of requests, from a file or made up.

Only numbers matter here: when each comes, how many tokens its prompt and its answer have, and which prompts begin
alike.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from liaoyuan.errors import LiaoyuanError

KEYS = ("arrival", "prompt_tokens", "output_tokens", "prefix", "prefix_tokens")


@dataclass(frozen=True)
class Ask:
    """One request. arrival: seconds from the beginning. prefix: prompts of one name have their first `prefix_tokens`
    tokens in common; "" is like no other.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix: str = ""
    prefix_tokens: int = 0


def read_asks(path: Path) -> list[Ask]:
    """Return the requests of a JSON Lines file in order of arrival; a line has the keys of `Ask`.

    Raises:
        LiaoyuanError: the file is missing or empty, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LiaoyuanError(f"The trace {path} cannot be read: {error}.") from error
    asks = [_ask(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not asks:
        raise LiaoyuanError(f"The trace {path} is empty: a line is a request, with {', '.join(KEYS[:3])}.")
    return sorted(asks, key=lambda ask: ask.arrival)


def made_up(rate: float, prompt: float, output: float, count: int, spread: float = 0.6, seed: int = 0) -> list[Ask]:
    """Return `count` requests that come at random (Poisson), `rate` a second, with log-normal lengths.

    prompt, output: mean tokens. spread: standard deviation of the logarithms of the lengths. What is drawn depends on
    `seed` alone: another rate stretches the same arrivals.
    """
    random = np.random.default_rng(seed)
    arrivals = random.exponential(1.0, count).cumsum() / rate
    prompts, outputs = (_lengths(random, mean, spread, count) for mean in (prompt, output))
    return [Ask(*one) for one in zip(arrivals.tolist(), prompts, outputs, strict=True)]


def hurried(asks: list[Ask], factor: float) -> list[Ask]:
    """Return the same requests, `factor` times as many a second."""
    return [replace(ask, arrival=ask.arrival / factor) for ask in asks]


def _lengths(random: np.random.Generator, mean: float, spread: float, count: int) -> list[int]:
    drawn = random.lognormal(math.log(mean) - spread**2 / 2, spread, count)
    found: list[int] = np.maximum(1, drawn.round()).astype(int).tolist()
    return found


def _ask(line: str, where: str) -> Ask:
    try:
        values = json.loads(line)
        ask = Ask(
            float(values["arrival"]),
            int(values["prompt_tokens"]),
            int(values["output_tokens"]),
            str(values.get("prefix", "")),
            int(values.get("prefix_tokens", 0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LiaoyuanError(
            f"{where}: a request is an object with arrival (seconds), prompt_tokens and output_tokens, and perhaps "
            f"prefix and prefix_tokens ({error!r})."
        ) from error
    if unknown := [key for key in values if key not in KEYS]:
        raise LiaoyuanError(f"{where}: there is no key '{unknown[0]}'; there are {', '.join(KEYS)}.")
    if not math.isfinite(ask.arrival) or ask.arrival < 0 or ask.prompt_tokens < 1 or ask.output_tokens < 1:
        raise LiaoyuanError(f"{where}: a request comes at 0 seconds or later and has at least one token each way.")
    if not 0 <= ask.prefix_tokens <= ask.prompt_tokens:
        raise LiaoyuanError(f"{where}: prefix_tokens must lie between 0 and prompt_tokens.")
    return ask

"""A request on its way through the engine, and the keys by which its blocks are known."""

import hashlib
import time
from dataclasses import dataclass, field

import numpy as np

from liaoyuan.inference.adapters import NONE, Loaded
from liaoyuan.inference.blocks import Key
from liaoyuan.inference.constraints.constraint import ConstraintState
from liaoyuan.inference.request import Completion, PromptLogprobs, Request, TopLogprobs

UNKNOWN = 1.0  # no logarithm of a probability


@dataclass(eq=False)
class Sequence:
    """A request and what it has so far. tokens, logprobs: of what was known when it last ran or began.

    limit: of prompt and completion together. deadline: by time.monotonic().
    keys: of its full blocks (`block_keys`), under `root`. cached: tokens of the prompt found in the prefix cache.
    added: when it came, by time.monotonic(). waited: seconds from then until it first ran.
    versions: (number of known tokens, version of the weights) each time it was started with others.
    scores: fp32 [prompt - 1], log-probabilities of the prompt's tokens after the first if they are wanted, `UNKNOWN`
        where they are not computed yet; rivals: of each of these places, if any are wanted.
    """

    request: Request
    seed: int
    limit: int
    arrival: int
    deadline: float | None
    tokens: np.ndarray
    logprobs: np.ndarray
    slot: int = -1  # -1: waiting
    account: int = 0
    adapter: Loaded = NONE
    root: Key = b""
    keys: list[Key] = field(default_factory=list)
    cached: int = -1  # -1: never started
    added: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    versions: list[tuple[int, int]] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    state: ConstraintState | None = None
    scores: np.ndarray | None = None
    rivals: dict[int, TopLogprobs] = field(default_factory=dict)
    error: str = ""  # why it cannot go on

    @property
    def is_scored(self) -> bool:
        """Whether all that is wanted of the prompt's log-probabilities is known."""
        return self.scores is None or not (self.scores == UNKNOWN).any()

    def token_versions(self, first: int, end: int) -> list[int]:
        """Return the versions of the weights that made tokens first .. end - 1."""
        made = []
        for index, (start, version) in enumerate(self.versions):
            stop = self.versions[index + 1][0] if index + 1 < len(self.versions) else end
            made += [version] * max(0, min(stop, end) - max(start, first))
        return made

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Return the log-probabilities of the prompt, if they were asked for and all are known."""
        if self.scores is None or not self.is_scored:
            return None
        top = [self.rivals[place] for place in range(1, len(self.request.prompt))] if self.rivals else []
        return PromptLogprobs(self.scores.tolist(), top)

    def completion(self, reason: str) -> Completion:
        start, end = len(self.request.prompt), len(self.tokens) - bool(self.error)  # an error gives no token
        return Completion(
            self.request.id,
            self.tokens[start:end].tolist(),
            self.logprobs[start:end].tolist(),
            reason,
            self.top_logprobs,
            self.token_versions(start, end),
            self.prompt_logprobs(),
            self.masks,
            max(0, self.cached),
        )


def root_key(version: int, adapter: str, salt: str) -> Key:
    """Return what a request's keys begin with: equal prompts of other weights, adapters or salts share nothing.

    adapter: its digest, not its name, which another one may have later, or in another process.
    """
    words = [str(version), adapter, salt]
    return hashlib.blake2b("\0".join(f"{len(word)}:{word}" for word in words).encode(), digest_size=16).digest()


def block_keys(root: Key, known: list[Key], tokens: np.ndarray, block_size: int) -> None:
    """Add to `known`, keys of the first blocks of `tokens`, those of its other full blocks.

    A key is the hash of the one before it and the block's tokens, so it stands for everything up to the block's end; a
    strong hash, since whoever found a collision would read another's answers.
    """
    for index in range(len(known), len(tokens) // block_size):
        block = tokens[index * block_size : (index + 1) * block_size]
        before = known[index - 1] if index else root
        known.append(hashlib.blake2b(block.tobytes(), digest_size=16, key=before).digest())

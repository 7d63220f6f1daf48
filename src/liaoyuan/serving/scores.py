"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`), by one forward pass of the model."""

import threading
from dataclasses import dataclass
from typing import Protocol

import torch

from liaoyuan.models import Decoder
from liaoyuan.models.context import packed_context


@dataclass(frozen=True)
class PromptScores:
    """For each token of a prompt after the first: its log-probability and its most probable rivals."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class PromptScorer(Protocol):
    """Scores a prompt; called in a thread of its own, as it takes a while."""

    def __call__(self, prompt: tuple[int, ...], top: int) -> PromptScores: ...


class ModelScorer:
    """A PromptScorer of a model. One prompt at a time, so that memory stays bounded."""

    def __init__(self, model: Decoder) -> None:
        self._model, self._one = model, threading.Lock()

    def __call__(self, prompt: tuple[int, ...], top: int) -> PromptScores:
        with self._one, torch.inference_mode():
            device = self._model.embed_tokens.weight.device
            tokens = torch.tensor(prompt, device=device)
            positions, context = packed_context([len(prompt)], device)
            logits = self._model(tokens, positions, context)[:-1]
            scores = logits.float().log_softmax(-1)
            chosen = scores.gather(-1, tokens[1:, None]).squeeze(-1).tolist()
            values, rivals = scores.topk(min(top, scores.shape[1]), dim=-1)
        rows = zip(rivals.tolist(), values.tolist(), strict=True)
        return PromptScores(chosen, [list(zip(*row, strict=True)) for row in rows])

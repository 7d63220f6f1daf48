"""Log-probabilities of a whole prompt in one pass, with the bits of `evaluation.score`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from liaoyuan.inference.engine import Engine
from liaoyuan.inference.request import PromptLogprobs
from liaoyuan.inference.sampling import top_logprobs
from liaoyuan.inference.spread.memory import OwnMemory
from liaoyuan.models import Decoder, packed_context

ROWS = 1024  # whose logits are in memory at once


def most_scored(engine: Engine) -> int:
    """Return how long a prompt may be to be scored in one pass: none where only the engine reaches the whole head."""
    return engine.config.max_batch_tokens if isinstance(engine.memory, OwnMemory) else 0


@torch.inference_mode()
def prompt_logprobs(engine: Engine, adapter: str, prompt: Sequence[int], top: int) -> PromptLogprobs:
    """Return the log-probabilities of a prompt's tokens after the first, each with its `top` rivals; in the engine's
    thread, between two steps.
    """
    model = engine.model
    tokens = torch.tensor(prompt, device=model.embed_tokens.weight.device)
    positions, context = packed_context([len(prompt) - 1], tokens.device)
    with engine.adapters.everywhere(adapter):
        hidden = model(tokens[:-1], positions, context, hidden=True)
    logprobs = model.score(hidden, tokens[1:]).tolist()
    return PromptLogprobs(logprobs, list(_rivals(model, hidden, top)) if top else [[] for _ in logprobs])


def _rivals(model: Decoder, hidden: Tensor, top: int) -> Iterator[list[tuple[int, float]]]:
    for rows in hidden.split(ROWS):
        logits = model.logits(rows)
        tokens, values = top_logprobs(logits, min(top, logits.shape[1]))
        for row in zip(tokens.tolist(), values.tolist(), strict=True):
            yield list(zip(*row, strict=True))

"""How far a model's next tokens are from those of the model that it stands in for, such as one with whole weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, packed_context
from liaoyuan.rundir import Progress, Report, silent

ROWS = 1024  # whose logits of both models are in memory at once


@dataclass(frozen=True)
class Agreement:
    """Means over all places of some texts, but for the last of each.

    divergence: of Kullback and Leibler (1951), from the reference's distribution to the other's, in nats; worst: its
        highest percentile. same_first: share of places where both have the same most probable token.
    loss, reference_loss: cross-entropy of the texts' own tokens, in nats.
    difference, largest: mean and largest distance of the log-probabilities of those tokens.
    """

    divergence: float
    worst: float
    same_first: float
    loss: float
    reference_loss: float
    places: int
    difference: float
    largest: float


@torch.inference_mode()
def agreement(
    reference: Decoder, other: Decoder, token_lists: Sequence[Sequence[int]], report: Report = silent
) -> Agreement:
    """Compare the two models' predictions on lists of token ids, each read from its start.

    Raises:
        LiaoyuanError: the vocabularies differ, or no list has two tokens.
    """
    sizes = [model.config.vocab_size for model in (reference, other)]
    if sizes[0] != sizes[1]:
        raise LiaoyuanError(
            f"The models have vocabularies of {sizes[0]} and {sizes[1]} tokens: nothing can be compared."
        )
    found = []
    for number, tokens in enumerate(token_lists):
        found += _compared(reference, other, torch.tensor(tokens)) if len(tokens) > 1 else []
        report(Progress(number + 1, len(token_lists), "text", "agreement"))
    if not found:
        raise LiaoyuanError("No text has two tokens, so there is nothing to compare.")
    divergence, same, loss, reference_loss = torch.cat(found, 1).double()
    return Agreement(
        float(divergence.mean()),
        float(divergence.quantile(0.99)),
        float(same.mean()),
        float(loss.mean()),
        float(reference_loss.mean()),
        len(same),
        float((loss - reference_loss).abs().mean()),
        float((loss - reference_loss).abs().max()),
    )


def _compared(reference: Decoder, other: Decoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return fp32 [4, rows] of each run of rows: divergence, same first token, both losses."""
    place = reference.embed_tokens.weight.device
    tokens = tokens.to(place)
    positions, context = packed_context([len(tokens) - 1], place)
    found = []
    for rows in torch.arange(len(tokens) - 1, device=place).split(ROWS):
        ours, theirs = (
            model(tokens[:-1], positions, context, rows=rows).float().log_softmax(-1) for model in (other, reference)
        )
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0.0)
        same = (ours.argmax(-1) == theirs.argmax(-1)).float()
        targets = tokens[rows + 1, None]
        losses = (-each.gather(-1, targets)[:, 0] for each in (ours, theirs))
        found.append(torch.stack([divergence, same, *losses]).cpu())
    return found

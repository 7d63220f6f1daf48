"""Log-probabilities of given tokens: what every comparison with another system uses."""

from collections.abc import Iterator, Sequence

import torch

from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, packed_context

PACK_TOKENS = 4096  # documents are packed up to so many tokens a forward pass


@torch.inference_mode()
def score(model: Decoder, token_lists: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return for each list of token ids the log-probability of every token after the first, given those before it.

    Natural logarithm; computed in the model's own dtype, its softmax in fp32. A list of one token gives an empty one.

    Raises:
        LiaoyuanError: a list is longer than the model's context, or has an id outside its vocabulary.
    """
    for number, tokens in enumerate(token_lists):
        _check(model, number, tokens)
    results: list[list[float]] = [[] for _ in token_lists]
    for group in _groups([len(tokens) - 1 for tokens in token_lists]):
        chosen = [token_lists[number] for number in group]
        for number, values in zip(group, _score_packed(model, chosen), strict=True):
            results[number] = values
    return results


def _score_packed(model: Decoder, token_lists: list[Sequence[int]]) -> Iterator[list[float]]:
    place = model.embed_tokens.weight.device
    lengths = [len(tokens) - 1 for tokens in token_lists]
    positions, context = packed_context(lengths, place)
    inputs = torch.tensor([token for tokens in token_lists for token in tokens[:-1]], device=place)
    targets = torch.tensor([token for tokens in token_lists for token in tokens[1:]], device=place)
    log_probs = model(inputs, positions, context, targets=targets)
    for piece in log_probs.split(lengths):
        yield piece.tolist()


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield runs of the documents' numbers whose lengths add up to at most `PACK_TOKENS` (or one longer alone)."""
    group: list[int] = []
    total = 0
    for number, length in enumerate(lengths):
        if length < 1:
            continue
        if group and total + length > PACK_TOKENS:
            yield group
            group, total = [], 0
        group.append(number)
        total += length
    if group:
        yield group


def _check(model: Decoder, number: int, tokens: Sequence[int]) -> None:
    vocabulary, longest = model.config.vocab_size, model.config.max_position_embeddings
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise LiaoyuanError(f"List {number} has the token {wrong[0]}, but the vocabulary has {vocabulary} tokens.")
    if len(tokens) - 1 > longest:
        raise LiaoyuanError(f"List {number} has {len(tokens)} tokens, but the model reads at most {longest}.")

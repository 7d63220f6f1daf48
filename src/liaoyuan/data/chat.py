"""Which tokens of a conversation are learned: exactly those that the model itself would write.

The loss mask is not searched for in the text. The prompt of every assistant's turn is rendered as the server would
render it; what follows it in the whole conversation, up to the token that ends the turn, is the model's own.
"""

from collections.abc import Sequence

from liaoyuan.data.batches import TokenisedRecord
from liaoyuan.data.records import Message, Record, conversations
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError

Segment = tuple[list[int], float]  # ids, and the loss weight of each of them


def segments(tokenizer: Tokenizer, record: Record) -> list[Segment]:
    """Return the rendered conversation in pieces of one loss weight; their ids, put together, are `render`'s.

    An assistant's turn has its message's weight, all else 0. Templates leave the thoughts of earlier turns out; such
    a turn is learned as a fast answer, or not at all where the template gives it no form that could be asked for.

    Raises:
        LiaoyuanError: the record has no assistant's turn, or the template does not end turns with an end token.
    """
    turns = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
    if not turns:
        raise LiaoyuanError(f"Record {record.id!r} has no message of the assistant to learn from.")
    ids = tokenizer.render(record.messages, generation_prompt=False)
    pieces: list[Segment] = []
    done = 0
    for place in turns:
        begin = _prompt_length(tokenizer, record.messages[:place], ids)
        if begin is None and place != turns[-1]:
            continue
        end = None if begin is None else _end_of_turn(tokenizer, ids, begin)
        if begin is None or end is None:
            raise LiaoyuanError(f"The chat template does not show where the answer of record {record.id!r} is.")
        pieces += [(ids[done:begin], 0.0), (ids[begin:end], record.messages[place].weight)]
        done = end
    return [piece for piece in [*pieces, (ids[done:], 0.0)] if piece[0]]


def tokenise(tokenizer: Tokenizer, records: Sequence[Record]) -> list[TokenisedRecord]:
    """Return the tokens and loss weights of what is learned from records; see `segments` and `conversations`."""
    return [_tokenise(tokenizer, part) for record in records for part in conversations(record)]


def _tokenise(tokenizer: Tokenizer, record: Record) -> TokenisedRecord:
    pieces = segments(tokenizer, record)
    tokens = tuple(index for ids, _ in pieces for index in ids)
    return TokenisedRecord(tokens, tuple(weight for ids, weight in pieces for _ in ids))


def _prompt_length(tokenizer: Tokenizer, messages: Sequence[Message], ids: Sequence[int]) -> int | None:
    """Return the length of the longest prompt, slow or fast, with which `ids` begins; None if with neither."""
    prompts = (tokenizer.render(messages, thinking) for thinking in (True, False))
    return max((len(prompt) for prompt in prompts if list(ids[: len(prompt)]) == prompt), default=None)


def _end_of_turn(tokenizer: Tokenizer, ids: Sequence[int], begin: int) -> int | None:
    """Return the place after the first token from `begin` on that ends a turn; None if there is none."""
    return next((place + 1 for place in range(begin, len(ids)) if ids[place] in tokenizer.eos_ids), None)

"""Where the answers stand in a rendered conversation, found by rendering the prompt of each as a server would.

What follows a prompt in the whole conversation, up to the token that ends the turn, is the model's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

from liaoyuan.data.template import Tools
from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.errors import LiaoyuanError

Prompts = dict[int, tuple[str, str]]
Piece = tuple[str, int | None]  # a text, and the number of the message that is learned there


def outline(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], tools: Tools | None, known: Prompts | None = None
) -> list[Piece]:
    """Return the rendered conversation of guarded messages in pieces, each of one loss weight.

    known: slow and fast prompts by the number of messages before the answer, filled with those that are rendered.

    Templates leave the thoughts of earlier turns out; such a turn is learned as a fast answer, or not at all where the
    template gives it no form that could be asked for.

    Raises:
        LiaoyuanError: no assistant's turn, or the template does not show where the last one begins or ends.
    """
    turns = [place for place, row in enumerate(rows) if row["role"] == "assistant"]
    if not turns:
        raise LiaoyuanError("The conversation has no message of the assistant to learn from.")
    text = tokenizer.fill(rows, True, False, tools)
    ends = tokenizer.end_texts
    pieces: list[Piece] = []
    prompts = {} if known is None else known
    done = 0
    for place in turns:
        if place not in prompts:
            prompts[place] = _prompts(tokenizer, rows[:place], tools)

        def shows_thought(place: int = place) -> bool:
            bare = [*rows[:place], {**rows[place], "reasoning_content": ""}, *rows[place + 1 :]]
            has_thought = place < len(rows) - 1 and bool(rows[place].get("reasoning_content"))
            return not has_thought or tokenizer.fill(bare, True, False, tools) != text

        begin = _prompt_length(prompts[place], text, shows_thought)
        end = None if begin is None else _end_of_turn(text, begin, ends)
        if begin is None or end is None or begin < done:
            if place != turns[-1]:
                continue
            raise LiaoyuanError(
                "The model's chat template does not show where the answer is: "
                + ("no token ends it." if begin else "what it writes does not begin with its own prompt.")
            )
        pieces += [(text[done:begin], None), (text[begin:end], place)]
        done = end
    return [piece for piece in [*pieces, (text[done:], None)] if piece[0]]


def _prompts(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], tools: Tools | None) -> tuple[str, str]:
    """Return what a server would render of these messages for an answer with a thought, and for one without."""
    slow, fast = (tokenizer.fill(rows, thinking, True, tools) for thinking in (True, False))
    return slow, fast


def _prompt_length(prompts: tuple[str, str], text: str, shows_thought: Callable[[], bool]) -> int | None:
    """Return the length of the longest prompt, slow or fast, with which `text` begins; None if with neither.

    A turn whose thought the template left out does not answer a prompt that asks for one.
    """
    slow, fast = prompts
    if text.startswith(fast) and len(fast) >= len(slow):
        return len(fast)
    if text.startswith(slow):
        return len(slow) if shows_thought() else None
    return len(fast) if text.startswith(fast) else None


def _end_of_turn(text: str, begin: int, ends: Sequence[str]) -> int | None:
    """Return the place after the first of these tokens from `begin` on; None if there is none."""
    found = [(place, place + len(token)) for token in ends if (place := text.find(token, begin)) >= 0]
    return min(found)[1] if found else None

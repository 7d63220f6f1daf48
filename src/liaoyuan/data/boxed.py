"""The answers that a text puts into TeX boxes, as competition mathematics does: solutions of sets, and models' own."""

import re
from collections.abc import Iterator

BOXED = re.compile(r"\\(?:boxed|fbox)\s*")


def boxed(text: str) -> Iterator[str]:
    """Yield the content of each `\\boxed{...}`, outermost ones only; one that is never closed is left out."""
    place = 0
    while match := BOXED.search(text, place):
        place = match.end()
        if place < len(text) and text[place] == "{":
            end = _closing_brace(text, place)
            if end is None:
                return
            yield text[place + 1 : end].strip()
            place = end
        elif place < len(text):
            yield text[place]  # "\\boxed 5" is TeX for one character


def _closing_brace(text: str, start: int) -> int | None:
    """Return where the brace at `start` is closed, None if it never is; an escaped brace counts for nothing."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
        place += 1
    return None

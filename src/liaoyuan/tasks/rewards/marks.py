"""Where an answer says what its final answer is.

Four marks are known; the strongest that is there decides, whatever stands elsewhere:

1. a line "#### 42" (GSM8K),
2. "\\boxed{42}" (competition mathematics),
3. a sentence "the answer is 42", "Answer: 42", "答案是42", "答：42", "故选B",
4. no mark, where the whole text is the answer.

Which mark decides follows from the text alone, so that writing several answers gains nothing: a mark that comes twice
must say the same twice, and readers refuse what names more than one thing ("42 or 43").
"""

import re
from collections.abc import Iterator

LONGEST = 20_000  # characters; what is longer is no answer to a question with one answer
HASHES = re.compile(r"^[ \t]*####[ \t]*(.*)$", re.MULTILINE)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
PHRASE = re.compile(
    r"(?:\bthe (?:final |correct |right )?answer (?:is|equals|would be)\b"
    r"|^\W*(?:the )?(?:final |correct )?(?:answer|option|ans)(?: choice)?\s*"
    r"(?:is\b|\.(?! )|(?=[:：=*-]|\(?[A-H]\b|\$?[0-9]))"
    r"|(?:最终|最后的?|正确)?答案(?:应该|应当)?(?:是|为|选|(?=\s*[:：∶]))|^\W*答(?=\s*[:：∶])"
    r"|(?:故(?:答案)?|应|所以|因此)选择?)"
    r"[\s*_]*[:：∶=]?(?:-\s)?[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
END = re.compile(r"\n|。|(?<!\d)．|．(?!\d)|\.(?=[\s*_\"')]|$)")  # of the sentence that a phrase begins


def final_answers(text: str) -> tuple[str, list[str]]:
    """Return the mark that decides ("hashes", "boxed", "phrase" or "whole"), and all that it marks, in order."""
    if len(text) > LONGEST:
        return "whole", []
    found = [match[1].strip() for match in HASHES.finditer(text)]
    if found:
        return "hashes", found
    found = list(boxed(text))
    if found:
        return "boxed", found
    found = [_sentence(text, match.end()) for match in PHRASE.finditer(text)]
    return ("phrase", found) if found else ("whole", [text.strip()])


def boxed(text: str) -> Iterator[str]:
    """Yield the content of each `\\boxed{...}`, outermost ones only; one that is never closed is left out."""
    place = 0
    while match := BOXED.search(text, place):
        place = match.end()
        if place < len(text) and text[place] == "{":
            end = closing_brace(text, place)
            if end is None:
                return
            yield text[place + 1 : end].strip()
            place = end
        elif place < len(text):
            yield text[place]  # "\\boxed 5" is TeX for one character


def closing_brace(text: str, start: int) -> int | None:
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


def _sentence(text: str, start: int) -> str:
    match = END.search(text, start)
    return text[start : match.start() if match else len(text)].strip()

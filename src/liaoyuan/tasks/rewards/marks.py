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

from liaoyuan.data.boxed import boxed

LONGEST = 20_000  # characters; what is longer is no answer to a question with one answer
HASHES = re.compile(r"^[ \t]*####[ \t]*(.*)$", re.MULTILINE)
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


def _sentence(text: str, start: int) -> str:
    match = END.search(text, start)
    return text[start : match.start() if match else len(text)].strip()

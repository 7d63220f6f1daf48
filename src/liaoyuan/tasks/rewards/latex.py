"""Tidying a mathematical answer in LaTeX, and what must be known of it before it is compared."""

import re
import unicodedata

from liaoyuan.tasks.rewards.marks import final_answers
from liaoyuan.tasks.rewards.numbers import only_number, read_number

LONGEST = 400  # characters of an answer
DEEPEST = 12  # nested braces
WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
ALTERNATIVE = re.compile(
    r"(?<=[0-9])\s+(?=[0-9])|\\(?:text|mathrm|mbox)\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b|[或和、;]", re.IGNORECASE
)
UNDONE = re.compile(r"\\(?:int|i+nt|oint|sum|prod|lim|frac\s*\{\s*d)(?![a-z])")  # work that the question wants done
HUGE = re.compile(r"\*\*|\^\s*\{[^{}]*\^|\^\s*\{?\s*-?[0-9]{4}|\^\s*[^{}\s]\s*\^|[0-9)}]{3}\s*!|!\s*!|\)\s*!")
EQUALS = re.compile(r"(?<![<>!\\])=(?!=)")
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\([A-Za-z,]+\))?|\\angle[A-Z]+|[A-Z]{2,3}")
FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "exp"))
SOME_NUMBER = re.compile(r"-?[0-9][0-9,./]*")
_NUMBERED = re.compile(r"[0-9\\^_=]")
_DOUBTFUL = re.compile(r"\b(?:not|or|and)\b|[或不]")
_SPACES = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg|,|!|;|:| )|(?<!\\)~|\s+")


def contents_of(text: str, last: bool) -> list[str]:
    """Return what an answer marks as its final answer, tidied; nothing where it marks none.

    last: where nothing is marked, the last formula or number written is taken.
    """
    mark, contents = final_answers(text)
    found = [_inside(content, mark == "whole") for content in contents]
    if mark == "whole" and last and not _is_answer(found):
        formulas = [next(filter(None, groups)) for groups in MATHS.findall(text)] or SOME_NUMBER.findall(text)
        found = [tidy(formulas[-1])] if formulas else []
    return found if _is_answer(found) else []


def tidy(text: str) -> str:
    """Return LaTeX in one width, without dollar signs, spaces of layout, and a full stop."""
    text = unicodedata.normalize("NFKC", text).strip().strip("*`").strip()
    text = re.sub(r"^\$+|\$+$|^\\[(\[]|\\[)\]]$", "", text).strip()
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace("−", "-"))
    text = re.sub(r"\\(?:boxed|fbox)\s*\{(.*)\}$", r"\1", text)
    return text.rstrip(".。").strip()


def bare(text: str) -> str:
    """Return what is left of tidied LaTeX without any space and text command, to compare the writing itself."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    return _SPACES.sub("", text)


def words_of(text: str) -> str | None:
    """Return a right answer that consists of words ("\\text{Evelyn}"), else None."""
    inner = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text).strip()
    is_formula = "\\" in inner or len(inner) < 2 or (inner == text and len(inner) < 4)
    return " ".join(inner.split()).casefold() if not is_formula and WORDS.fullmatch(inner) else None


def formulas_of(question: str) -> list[str]:
    """Return the formulas that a question has, tidied."""
    return [tidy(next(filter(None, groups))) for groups in MATHS.findall(question)]


def sides(text: str) -> tuple[str, str] | None:
    """Return both sides of tidied LaTeX that is one equation, else None."""
    parts = EQUALS.split(text)
    return (parts[0].strip(), parts[1].strip()) if len(parts) == 2 and all(part.strip() for part in parts) else None


def named(text: str) -> tuple[str, str]:
    """Return the name and the value of "x = 3 + 4 = 7": "x" and "7"; no name where none stands there.

    What is on the left must be a name ("x", "f(x)", "AB") or numbers alone; another equation is its own value.
    """
    *left, value = (part.strip() for part in EQUALS.split(text))
    names = [part for part in left if re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", part)) or not part]
    if not left or not value or len(names) > 1 or not all(NAME.fullmatch(bare(name)) for name in names):
        return "", text
    return (names[0] if names else ""), value


def strange_words(answer: str, gold: str) -> bool:
    """Whether an answer has words beside its formula: letters in a row that are neither functions nor in the gold."""
    inner = re.sub(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s*\{[^{}]*\}\s*(?:\^\{?[23]\}?)?$", "", answer)
    letters = set(re.findall(r"[A-Za-z]", gold))
    runs = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", inner))
    return any(run not in FUNCTIONS and not set(run) <= letters for run in runs)


def _inside(content: str, whole: bool) -> str:
    """Return the only formula of a sentence, if it has one and the rest names no number; else the whole, tidied.

    whole: nothing marks the sentence as the answer, so it must be the formula and a full stop.
    """
    formulas = list(MATHS.finditer(content))
    rest = MATHS.sub("", content).strip(" .。*")
    if len(formulas) == 1 and not (whole and rest) and not _NUMBERED.search(rest) and not _DOUBTFUL.search(rest):
        return tidy(next(filter(None, formulas[0].groups())))
    if not whole and not formulas and _is_prose(content) and (number := only_number(content)):
        return str(number.value)
    return tidy(content)


def _is_answer(contents: list[str]) -> bool:
    """Whether the contents may be formulas: not too long, no prose, their braces closed."""
    return bool(contents) and all(
        0 < len(content) <= LONGEST and _is_balanced(content) and not _is_prose(content) for content in contents
    )


def _is_balanced(content: str) -> bool:
    """Whether braces are closed and not too deep: the grammar takes seconds over what is not."""
    depth = deepest = 0
    for brace in re.findall(r"(?<!\\)[{}]", content):
        depth += 1 if brace == "{" else -1
        deepest = max(deepest, depth)
        if depth < 0:
            return False
    return depth == 0 and deepest <= DEEPEST


def _is_prose(content: str) -> bool:
    bare_words = re.sub(r"\\[A-Za-z]+|\{[^{}]*\}", " ", content)
    return len(re.findall(r"[A-Za-z]{2,}", bare_words)) > 3 and read_number(content) is None

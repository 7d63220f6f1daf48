"""Tidying a mathematical answer in LaTeX, and what must be known of it before it is compared."""

import re
import unicodedata

from liaoyuan.tasks.rewards.marks import final_answers
from liaoyuan.tasks.rewards.numbers import read_number

LONGEST = 400  # characters of an answer
WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
ALTERNATIVE = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b|[或和、;]", re.IGNORECASE)
UNDONE = re.compile(r"\\(?:int|i+nt|oint|sum|prod|lim|frac\s*\{\s*d)(?![a-z])")  # work that the question wants done
HUGE = re.compile(r"\^\s*\{[^{}]*\^|\^\s*\{?\s*-?[0-9]{4}|\^\s*[^{}\s]\s*\^|[0-9)}]{3}\s*!|!\s*!|\)\s*!")
_SPACES = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg|,|!|;|:| )|(?<!\\)~|\s+")


def contents_of(text: str, last: bool) -> list[str]:
    """Return what an answer marks as its final answer, tidied; nothing where it marks none.

    last: where nothing is marked, the last formula or number written is taken.
    """
    mark, contents = final_answers(text)
    found = [_inside(content) for content in contents]
    if mark == "whole" and last and not _is_answer(found):
        formulas = [next(filter(None, groups)) for groups in MATHS.findall(text)] or re.findall(
            r"-?[0-9][0-9,./]*", text
        )
        found = [tidy(formulas[-1])] if formulas else []
    return found if _is_answer(found) else []


def tidy(text: str) -> str:
    """Return LaTeX in one width, without dollar signs, spaces of layout, and a full stop."""
    text = unicodedata.normalize("NFKC", text).strip().strip("*`").strip()
    text = re.sub(r"^\$+|\$+$|^\\[(\[]|\\[)\]]$", "", text).strip()
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


def _inside(content: str) -> str:
    """Return the only formula of a sentence, if it has one and the rest names no number; else the whole, tidied."""
    formulas = list(MATHS.finditer(content))
    if len(formulas) == 1:
        rest = MATHS.sub("", content)
        if not re.search(r"[0-9\\^_=]", rest) and not re.search(r"\b(?:not|or|and)\b|[或不]", rest):
            return tidy(next(filter(None, formulas[0].groups())))
    return tidy(content)


def _is_answer(contents: list[str]) -> bool:
    """Whether the contents may be formulas: not too long, one line each, and no prose."""
    return bool(contents) and all(
        0 < len(content) <= LONGEST and "\n" not in content.strip() and not _is_prose(content) for content in contents
    )


def _is_prose(content: str) -> bool:
    bare_words = re.sub(r"\\[A-Za-z]+|\{[^{}]*\}", " ", content)
    return len(re.findall(r"[A-Za-z]{2,}", bare_words)) > 3 and read_number(content) is None

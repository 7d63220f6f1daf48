"""Texts in English and Chinese, how they become escaped HTML of which the page shows one language; style sheets."""

import html
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Text:
    """The same in both languages."""

    en: str
    zh: str


Words = Text | str  # a plain string reads the same in both languages (a number, a name, code)


def markup(words: Words, tag: str = "span") -> str:
    """Return escaped HTML; a `Text` becomes two elements, of which the style sheet hides one."""
    if isinstance(words, str):
        return html.escape(words)
    pairs = (("en", words.en), ("zh", words.zh))
    return "".join(f'<{tag} lang="{language}">{html.escape(text)}</{tag}>' for language, text in pairs)


def plain(words: Words) -> str:
    """Return the English text: for a place where no element may stand, such as the page's title."""
    return words if isinstance(words, str) else words.en


def asset(name: str) -> str:
    """Return a file of this room, such as the colours, as text."""
    return resources.files("liaoyuan.report").joinpath(name).read_text(encoding="utf-8")

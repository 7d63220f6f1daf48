"""Page, section and parts: each knows its HTML, everything is escaped."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from liaoyuan.report.plot import Plot
from liaoyuan.report.text import Text, Words, asset, markup, plain


@dataclass(frozen=True)
class Paragraph:
    text: Words

    def markup(self, prefix: str) -> str:
        return f"<p>{markup(self.text)}</p>"


@dataclass(frozen=True)
class Noted:
    """A value of a table with a small note under it, such as its interval."""

    value: Words
    note: Words


Cell = Words | Noted


@dataclass(frozen=True)
class Table:
    """A table of numbers, aligned right but for the first column; or, with `left`, a list of names and facts."""

    header: Sequence[Words]
    rows: Sequence[Sequence[Cell]]
    note: Words = ""
    left: bool = False

    def markup(self, prefix: str) -> str:
        head = "".join(f"<th>{markup(cell)}</th>" for cell in self.header)
        lines = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        note = f'<p class="note">{markup(self.note)}</p>' if self.note else ""
        kind = "left" if self.left else "numbers"
        head = f"<thead><tr>{head}</tr></thead>" if self.header else ""
        return f'<div class="scroll"><table class="{kind}">{head}<tbody>{lines}</tbody></table></div>{note}'


def _cell(cell: Cell) -> str:
    return f"{markup(cell.value)}<small>{markup(cell.note)}</small>" if isinstance(cell, Noted) else markup(cell)


@dataclass(frozen=True)
class Figure:
    """One number that the reader shall remember, what it is, and what it is compared with."""

    value: str
    label: Words
    note: Words = ""


@dataclass(frozen=True)
class KeyFigures:
    figures: Sequence[Figure]

    def markup(self, prefix: str) -> str:
        cards = (
            f'<li><b>{html.escape(figure.value)}</b><span class="label">{markup(figure.label)}</span>'
            f"<small>{markup(figure.note)}</small></li>"
            for figure in self.figures
        )
        return f'<ul class="figures">{"".join(cards)}</ul>'


@dataclass(frozen=True)
class Sample:
    """A question with its right answer and what the model wrote before and after; None where that is not known."""

    question: str
    answer: str
    before: str
    after: str
    before_right: bool | None = None
    after_right: bool | None = None


VERDICTS: dict[bool | None, tuple[Words, str]] = {
    True: (Text("✓ right", "✓ 正确"), "right"),
    False: (Text("✗ wrong", "✗ 错误"), "wrong"),
    None: ("", ""),
}


@dataclass(frozen=True)
class Side:
    """One of several answers to a question: who wrote it or what it is worth, and whether it is right, if known."""

    name: Words
    text: str
    right: bool | None = None

    def markup(self) -> str:
        verdict, kind = VERDICTS[self.right]
        return (
            f'<div class="side {kind}"><h4>{markup(self.name)} <em>{markup(verdict)}</em></h4>'
            f"<pre>{html.escape(self.text)}</pre></div>"
        )


@dataclass(frozen=True)
class Answers:
    """A question with its right answer, and answers to it side by side."""

    question: str
    answer: str
    sides: Sequence[Side]

    def markup(self, prefix: str) -> str:
        answer = markup(Text("right answer", "正确答案"))
        return (
            f'<article class="sample"><header><pre>{html.escape(self.question)}</pre>'
            f"<p>{answer} <code>{html.escape(self.answer)}</code></p></header>"
            f'<div class="sides">{"".join(side.markup() for side in self.sides)}</div></article>'
        )


@dataclass(frozen=True)
class Samples:
    """Samples side by side, under the names of what wrote them."""

    samples: Sequence[Sample]
    before: Words
    after: Words

    def markup(self, prefix: str) -> str:
        return f'<div class="samples">{"".join(self._one(sample).markup(prefix) for sample in self.samples)}</div>'

    def _one(self, sample: Sample) -> Answers:
        sides = (
            Side(self.before, sample.before, sample.before_right),
            Side(self.after, sample.after, sample.after_right),
        )
        return Answers(sample.question, sample.answer, sides)


@dataclass(frozen=True)
class Code:
    """A text file shown as it is, folded under its title."""

    title: Words
    text: str

    def markup(self, prefix: str) -> str:
        body = f"<pre>{html.escape(self.text)}</pre>"
        return f'<details class="code"><summary>{markup(self.title)}</summary>{body}</details>'


Part = Paragraph | Table | KeyFigures | Samples | Answers | Code | Plot


@dataclass(frozen=True)
class Section:
    title: Words
    parts: Sequence[Part]

    def markup(self, prefix: str) -> str:
        """Return the section; neighbouring plots, and lists of facts, stand side by side on a wide screen."""
        heading = f"<h2>{markup(self.title)}</h2>" if self.title else ""
        pieces, row = [], []
        for index, part in enumerate(self.parts):
            piece = part.markup(f"{prefix}-{index}")
            if isinstance(part, Plot) or (isinstance(part, Table) and part.left):
                row.append(piece)
                continue
            pieces += [*_row(row), piece]
            row = []
        return f'<section id="{prefix}">{heading}{"".join([*pieces, *_row(row)])}</section>'


def _row(pieces: list[str]) -> list[str]:
    return [f'<div class="row">{"".join(pieces)}</div>'] if pieces else []


@dataclass(frozen=True)
class Page:
    """A whole report: `subtitle` under the title, then the sections.

    refresh_seconds: an open page looks after so many whether it was written anew; None: it is what it will be.
    """

    title: Words
    sections: Sequence[Section]
    subtitle: Words = ""
    refresh_seconds: int | None = None

    def html(self) -> str:
        """Return the page: one file, no reference outside it, the same bytes for the same contents."""
        body = "".join(section.markup(f"s{index}") for index, section in enumerate(self.sections))
        refresh = f'<meta http-equiv="refresh" content="{self.refresh_seconds}">' if self.refresh_seconds else ""
        switch = '<button type="button" id="language" aria-label="Language · 语言">中文</button>'
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark">{refresh}'
            f"<title>{html.escape(plain(self.title))}</title><style>{asset('colours.css')}{asset('page.css')}</style></head><body>"
            f'<header class="top"><div><h1>{markup(self.title)}</h1>'
            f'<p class="subtitle">{markup(self.subtitle)}</p></div>{switch}</header>'
            f"<main>{body}</main><script>{asset('page.js')}</script></body></html>\n"
        )

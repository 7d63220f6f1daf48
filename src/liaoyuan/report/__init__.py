"""A self-contained `report.html` from plain texts, tables and numbers; knows nothing of what they mean.

A `Page` has sections, a section has parts. Whatever is shown may be a `Text` in English and Chinese: the reader's
browser chooses, a switch changes it. `Page.html()` needs no network, no other file, and is the same every time.
`picture` gives one plot as a file of its own, for a document.
"""

from liaoyuan.report.page import (
    Answers,
    Cell,
    Code,
    Figure,
    KeyFigures,
    Noted,
    Page,
    Paragraph,
    Part,
    Sample,
    Samples,
    Section,
    Side,
    Table,
)
from liaoyuan.report.picture import picture
from liaoyuan.report.plot import Bar, Bars, Gantt, Interval, Intervals, Line, Lines, Plot, Point, Points, Stretch
from liaoyuan.report.text import Text, Words

__all__ = [
    "Answers",
    "Bar",
    "Bars",
    "Cell",
    "Code",
    "Figure",
    "Gantt",
    "Interval",
    "Intervals",
    "KeyFigures",
    "Line",
    "Lines",
    "Noted",
    "Page",
    "Paragraph",
    "Part",
    "Plot",
    "Point",
    "Points",
    "Sample",
    "Samples",
    "Section",
    "Side",
    "Stretch",
    "Table",
    "Text",
    "Words",
    "picture",
]

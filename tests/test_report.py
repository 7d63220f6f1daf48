"""The report is one file, says everything in two languages, shows hostile text as text and survives odd numbers."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from liaoyuan.report import (
    Bar,
    Bars,
    Code,
    Figure,
    Interval,
    Intervals,
    KeyFigures,
    Line,
    Lines,
    Page,
    Paragraph,
    Plot,
    Point,
    Points,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    picture,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('1')</script> & \"$x_1^{\" @0@ 燎原"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects ids, references and texts, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def full_page(word: str = "word", numbers: tuple[float, ...] = (0.1, 0.5, 0.9)) -> Page:
    """Return a page with every kind of part; every text is `word`, every number is one of `numbers`."""
    low, mean, high = numbers
    text = Text(word, f"文{word}")
    curve = Line(text, [1.0, 2.0, 3.0], list(numbers), list(numbers), list(numbers))
    lines = Lines(text, text, [curve, curve], smooth=2, percent=True)
    bars = Bars(text, [Bar(text, number, word, strong=True) for number in numbers])
    dots = Intervals(text, [text, text], [text, text], [[Interval(mean, low, high), None]] * 2, zero=True)
    roof = Line(text, [1.0, 10.0], [1.0, 10.0])
    points = Points(text, text, [Point(text, 2.0, 3.0), *(Point(text, number, number) for number in numbers)], [roof])
    parts = [
        Paragraph(text),
        KeyFigures([Figure(word, text, text)]),
        Table([text, text], [[text, word]], note=text),
        *(Plot(text, drawing, text) for drawing in (lines, bars, dots, points)),
        Samples([Sample(word, word, word, word, True, None)], text, text),
        Code(text, word),
    ]
    return Page(text, [Section(text, parts), Section(text, parts)], subtitle=text)


def test_the_page_refers_to_nothing_outside_itself():
    reader = read(full_page().html())
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert reader.links, "the plots refer to their own parts"
    assert "@import" not in full_page().html()


def test_ids_are_unique_over_all_plots():
    ids = read(full_page().html()).ids
    assert len(ids) == len(set(ids))


def test_the_same_contents_give_the_same_bytes():
    assert full_page().html() == full_page().html()


def test_every_text_is_there_in_both_languages():
    page = full_page("word").html()
    english, chinese = (len(re.findall(f'lang="{language}">{word}<', page)) for language, word in
                        (("en", "word"), ("zh", "文word")))  # fmt: skip
    assert english == chinese > 20


def test_hostile_text_is_shown_as_text():
    reader = read(full_page(HOSTILE).html())
    assert reader.scripts == 1, "only the page's own script"
    assert "".join(reader.texts).count(HOSTILE) > 20


@pytest.mark.parametrize(
    "numbers",
    [(math.nan,) * 3, (math.inf, 1.0, -math.inf), (0.0, 0.0, 0.0), (1e300, 1e-300, -1e300)],
    ids=["nan", "infinite", "zero", "extreme"],
)
def test_odd_numbers_make_no_page_fail(numbers):
    page = full_page(numbers=numbers).html()
    read(page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().replace("finance", "")


def test_no_data_says_so():
    empty = [Lines("x", "y", []), Bars("x", []), Intervals("x", [], [], []), Points("x", "y", [Point("p", 0.0, 1.0)])]
    page = Page("t", [Section("s", [Plot("p", drawing) for drawing in empty])]).html()
    assert page.count("No figures were recorded.") == 4


def test_a_plot_takes_its_colours_from_the_page():
    page = full_page().html()
    assert "var(--series-0)" in page
    assert "#0102" not in page and "#0103" not in page
    assert "DejaVu Sans'" not in page


def test_a_long_curve_is_thinned_but_keeps_its_end():
    curve = Line("", list(range(10_000)), [float(x) for x in range(10_000)])
    page = Page("t", [Section("s", [Plot("p", Lines("x", "y", [curve]))])]).html()
    assert len(page) < 60_000


def test_a_picture_is_one_svg_file_with_title_legend_and_both_colour_schemes():
    curve = Line(Text("greedy", "贪心"), [0.0, 8.0, 16.0], [0.1, 0.5, 0.9], [0.0, 0.4, 0.8], [0.2, 0.6, 1.0])
    drawn = Lines("tokens", Text("% right", "正确率 %"), [curve, Line(HOSTILE, [0.0, 16.0], [0.2, 0.2])], percent=True)
    file = picture(Plot(Text("Accuracy & budget", "正确率"), drawn))
    root = ElementTree.fromstring(file)  # it is well-formed XML, which an SVG that stands alone must be
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert {"Accuracy & budget", "greedy", HOSTILE} <= set(texts)
    assert len(list(root.iter(f"{SVG}script"))) == 0 and "prefers-color-scheme: dark" in file
    assert not re.search(r'(?:src|href)="(?!#)|@import|url\((?!#)', file), "it needs nothing but itself"
    assert file == picture(Plot(Text("Accuracy & budget", "正确率"), drawn))
    with pytest.raises(ValueError, match="nothing to draw"):
        picture(Plot("empty", Lines("x", "y", [])))

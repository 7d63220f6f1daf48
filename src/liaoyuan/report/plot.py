"""Plots: plain numbers drawn by matplotlib as inline SVG that takes the page's colours, font and language.

matplotlib draws with marker colours and marker texts; both are replaced afterwards, by CSS variables (so a plot
follows light and dark) and by the text in two languages. Numbers that are not finite are left out.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from liaoyuan.report.text import Text, Words, markup

SERIES = 6  # colours that the style sheet names --series-0 to --series-5
INK, FAINT, GRID, PAPER = "#010201", "#010202", "#010203", "#010204"  # marker colours, replaced by CSS variables
VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid", PAPER: "--paper"}
LARGEST = 1e30  # that a logarithmic axis shows: beyond it matplotlib's own margins overflow
WIDTHS = {False: 5.2, True: 9.4}  # inches of a plot and of a wide plot; the page scales both to their column
NO_DATA = Text("No figures were recorded.", "没有记录到数据。")


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` draw a band around it. `colour` keeps a thing's colour the same in every plot."""

    name: Words
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Lines:
    """Curves over common axes. `smooth` > 1 draws the mean of that many neighbours over the faint raw curve."""

    x_label: Words
    y_label: Words
    lines: Sequence[Line]
    smooth: int = 1
    percent: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar with its value written at its end; `strong` marks the one that the reader looks for."""

    name: Words
    value: float
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, first on top."""

    x_label: Words
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Interval:
    """A measured value and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """Dots with whiskers: one row per group, in it one dot per series; `values[s][g]` may be None."""

    x_label: Words
    groups: Sequence[Words]
    series: Sequence[Words]
    values: Sequence[Sequence[Interval | None]]
    percent: bool = True
    zero: bool = False  # draw the line at zero that a difference is compared with


@dataclass(frozen=True)
class Point:
    name: Words
    x: float
    y: float


@dataclass(frozen=True)
class Points:
    """Named points over logarithmic axes, under `curves` that bound them."""

    x_label: Words
    y_label: Words
    points: Sequence[Point]
    curves: Sequence[Line] = ()


@dataclass(frozen=True)
class Stretch:
    """From `begin` to `end` something of kind `kind` goes on in row `row` (both by number)."""

    row: int
    kind: int
    begin: float
    end: float


@dataclass(frozen=True)
class Gantt:
    """What goes on when: rows, first on top, with stretches whose colours are their kinds. Stretches that a reader
    could not tell apart are drawn as one.
    """

    x_label: Words
    rows: Sequence[Words]
    kinds: Sequence[Words]
    stretches: Sequence[Stretch]


Drawing = Lines | Bars | Intervals | Points | Gantt


@dataclass(frozen=True)
class Plot:
    """A titled plot with a legend (in the page, not the picture) and an optional note below."""

    title: Words
    drawing: Drawing
    note: Words = ""
    wide: bool = False

    def markup(self, prefix: str) -> str:
        """Return the `<figure>`; `prefix` makes the ids of this picture different from those of the others."""
        title = f"<h3>{markup(self.title)}</h3>"
        note = f"<figcaption>{markup(self.note)}</figcaption>" if self.note else ""
        kind = "plot wide" if self.wide else "plot"
        body = svg(self, prefix) if has_data(self.drawing) else f"<p>{markup(NO_DATA)}</p>"
        return f'<figure class="{kind}">{title}{_legend(self.drawing)}{body}{note}</figure>'


@dataclass
class _Labels:
    """Texts of one picture, drawn as short markers that `svg` replaces afterwards."""

    words: list[Words] = field(default_factory=list)

    def __call__(self, words: Words) -> str:
        self.words.append(words)
        return f"@{len(self.words) - 1}@"


def has_data(drawing: Drawing) -> bool:
    if isinstance(drawing, Lines):
        return any(_finite(line) for line in drawing.lines)
    if isinstance(drawing, Bars):
        return any(math.isfinite(bar.value) for bar in drawing.bars)
    if isinstance(drawing, Points):
        return any(_is_drawable(point) for point in drawing.points)
    if isinstance(drawing, Gantt):
        return bool(_told_apart(drawing))
    return any(_is_finite(value) for row in drawing.values for value in row)


def _is_drawable(point: Point) -> bool:
    return all(1 / LARGEST < number < LARGEST for number in (point.x, point.y))


def _is_finite(value: Interval | None) -> bool:
    return value is not None and all(math.isfinite(number) for number in (value.mean, value.low, value.high))


def legend(drawing: Drawing) -> list[tuple[Words, int]]:
    """Return what the colours mean, name and number of each; nothing where there is one alone."""
    if isinstance(drawing, Bars):
        return []
    if isinstance(drawing, Lines):
        entries = [(line.name, i if line.colour is None else line.colour) for i, line in enumerate(drawing.lines)]
    elif isinstance(drawing, Points):
        entries = [(line.name, i + 1) for i, line in enumerate(drawing.curves)]
    elif isinstance(drawing, Gantt):
        entries = [(name, i) for i, name in enumerate(drawing.kinds)]
    else:
        entries = [(name, i) for i, name in enumerate(drawing.series)]
    return [(name, colour % SERIES) for name, colour in entries] if len(entries) > 1 else []


def _legend(drawing: Drawing) -> str:
    items = [f'<li><i class="swatch s{colour}"></i>{markup(name)}</li>' for name, colour in legend(drawing)]
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def svg(plot: Plot, prefix: str) -> str:
    """Draw and return `<svg>`: marker colours and texts replaced, ids prefixed, matplotlib's own frame removed."""
    import matplotlib
    from matplotlib.figure import Figure

    labels = _Labels()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "liaoyuan", "font.size": 9.0}
    with matplotlib.rc_context(style):
        rows = _rows(plot.drawing)
        height = 0.75 + 0.30 * rows if rows else 3.0
        figure = Figure(figsize=(WIDTHS[plot.wide], height))
        figure.patch.set_visible(False)
        axes = figure.subplots()
        _draw(axes, plot.drawing, labels)
        _margins(figure, axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _adopt(buffer.getvalue(), prefix, labels.words, plot.title)


def _draw(axes: Any, drawing: Drawing, labels: _Labels) -> None:
    if isinstance(drawing, Lines):
        _draw_lines(axes, drawing, labels)
    elif isinstance(drawing, Bars):
        _draw_bars(axes, drawing, labels)
    elif isinstance(drawing, Points):
        _draw_points(axes, drawing, labels)
    elif isinstance(drawing, Gantt):
        _draw_gantt(axes, drawing, labels)
    else:
        _draw_intervals(axes, drawing, labels)


def _rows(drawing: Drawing) -> int:
    """Return how many rows a drawing that has named rows is high; others 0."""
    if isinstance(drawing, Bars):
        return len(drawing.bars)
    if isinstance(drawing, Gantt):
        return len(drawing.rows)
    if isinstance(drawing, Intervals):
        return max(2, round(len(drawing.groups) * (0.7 + 0.25 * len(drawing.series))))
    return 0


def _margins(figure: Any, axes: Any, plot: Plot) -> None:
    """Fix the margins in inches: the browser's font differs from the one matplotlib measures with."""
    width, height = figure.get_size_inches()
    named_rows = not isinstance(plot.drawing, Lines | Points)
    left = 1.75 if named_rows else 0.62
    figure.subplots_adjust(
        left=left / width,
        right=1 - (0.55 if named_rows else 0.15) / width,
        top=1 - (0.08 if named_rows else 0.30) / height,
        bottom=0.50 / height,
    )


def _frame(axes: Any, labels: _Labels, x_label: Words, y_label: Words = "") -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=FAINT, length=0, pad=5)
    axes.set_axisbelow(True)
    axes.set_xlabel(labels(x_label), color=FAINT, labelpad=5)
    if y_label:  # above the axis and level: easier to read than a turned label
        axes.set_title(labels(y_label), loc="left", color=FAINT, fontsize=9, pad=8, x=-0.09)


def _colour(series: int) -> str:
    return f"#0103{series % SERIES:02x}"


def _finite(line: Line) -> list[tuple[float, ...]]:
    columns = [line.x, line.y, line.low, line.high] if line.low else [line.x, line.y]
    return [row for row in zip(*columns, strict=False) if all(math.isfinite(number) for number in row)]


def _draw_lines(axes: Any, drawing: Lines, labels: _Labels) -> None:
    _frame(axes, labels, drawing.x_label, drawing.y_label)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    factor = 100.0 if drawing.percent else 1.0
    for index, line in enumerate(drawing.lines):
        points = _thin(_finite(line))
        if not points:
            continue
        columns = [list(column) for column in zip(*points, strict=True)]
        x, y = columns[0], [factor * value for value in columns[1]]
        colour = _colour(index if line.colour is None else line.colour)
        _curve(axes, x, y, colour, drawing.smooth)
        if line.low:
            low, high = ([factor * value for value in column] for column in columns[2:4])
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    if drawing.log_y:
        axes.set_yscale("log")
    if drawing.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.xaxis.get_major_locator().set_params(integer=True)  # steps, levels and tokens are whole numbers
    axes.margins(x=0.02, y=0.08)


def _curve(axes: Any, x: list[float], y: list[float], colour: str, smooth: int) -> None:
    if smooth > 1 and len(y) > 2 * smooth:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
        y = [sum(part) / len(part) for part in (y[max(0, i - smooth) : i + smooth + 1] for i in range(len(y)))]
    marker = "o" if len(y) <= 16 else ""
    axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=3.5, solid_capstyle="round")


def _thin(points: list[tuple[float, ...]], most: int = 600) -> list[tuple[float, ...]]:
    """Keep at most about `most` points, evenly chosen and the last among them: a report is no archive."""
    step = -(-len(points) // most) or 1
    return points[::step] if not points or (len(points) - 1) % step == 0 else [*points[::step], points[-1]]


def _draw_bars(axes: Any, drawing: Bars, labels: _Labels) -> None:
    _frame(axes, labels, drawing.x_label)
    bars = [bar for bar in drawing.bars if math.isfinite(bar.value)]
    for row, bar in enumerate(bars):
        axes.barh(row, bar.value, height=0.62, color=_colour(0) if bar.strong else GRID)
        weight = "bold" if bar.strong else "normal"
        axes.annotate(labels(bar.text), (bar.value, row), (5, 0), textcoords="offset points", va="center_baseline",
                      color=INK, weight=weight)  # fmt: skip
    _name_rows(axes, [labels(bar.name) for bar in bars])
    axes.set_xlim(0, max(bar.value for bar in bars) * 1.08 or 1.0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_intervals(axes: Any, drawing: Intervals, labels: _Labels) -> None:
    _frame(axes, labels, drawing.x_label)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    factor, many = (100.0 if drawing.percent else 1.0), len(drawing.series)
    for index, row in enumerate(drawing.values):
        offset = (index - (many - 1) / 2) * 0.62 / max(many, 1)
        for group, value in enumerate(row):
            if value is None or not _is_finite(value):
                continue
            y, colour = group + offset, _colour(index)
            axes.plot([factor * value.low, factor * value.high], [y, y], color=colour, linewidth=1.6, alpha=0.75)
            axes.plot([factor * value.mean], [y], "o", color=colour, markersize=4.6)
    if drawing.zero:
        axes.axvline(0, color=FAINT, linewidth=1.0)
    if drawing.percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _name_rows(axes, [labels(name) for name in drawing.groups])
    axes.margins(x=0.05)


def _draw_points(axes: Any, drawing: Points, labels: _Labels) -> None:
    _frame(axes, labels, drawing.x_label, drawing.y_label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(axis="both", color=GRID, linewidth=0.6)
    for index, curve in enumerate(drawing.curves):
        axes.plot(curve.x, curve.y, color=_colour(index + 1), linewidth=1.6)
    for index, point in enumerate(sorted(filter(_is_drawable, drawing.points), key=lambda point: point.x)):
        axes.plot([point.x], [point.y], "o", color=_colour(0), markersize=5.0)
        beside = (6, 3 if index % 2 else -9)  # neighbours' names do not run into each other
        axes.annotate(labels(point.name), (point.x, point.y), beside, textcoords="offset points", color=INK)
    axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(which="minor", length=0)
    axes.margins(x=0.12, y=0.12)


def _draw_gantt(axes: Any, drawing: Gantt, labels: _Labels) -> None:
    _frame(axes, labels, drawing.x_label)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    for (row, kind), pieces in _told_apart(drawing).items():
        axes.broken_barh([(begin, end - begin) for begin, end in pieces], (row - 0.36, 0.72), color=_colour(kind))
    _name_rows(axes, [labels(name) for name in drawing.rows])
    axes.margins(x=0.0)


def _told_apart(drawing: Gantt, most: int = 1500) -> dict[tuple[int, int], list[list[float]]]:
    """Return by row and kind the stretches from begin to end; those nearer than a `most`th of the width are one."""
    known = [x for x in drawing.stretches if math.isfinite(x.begin) and math.isfinite(x.end) and x.end > x.begin]
    if not known:
        return {}
    gap = (max(x.end for x in known) - min(x.begin for x in known)) / most
    found: dict[tuple[int, int], list[list[float]]] = {}
    for x in sorted(known, key=lambda stretch: stretch.begin):
        pieces = found.setdefault((x.row, x.kind), [])
        if pieces and x.begin - pieces[-1][1] < gap:
            pieces[-1][1] = max(pieces[-1][1], x.end)
        else:
            pieces.append([x.begin, x.end])
    return found


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.tick_params(axis="y", colors=INK, pad=8)
    axes.set_ylim(len(names) - 0.45, -0.55)


def _adopt(svg: str, prefix: str, words: list[Words], title: Words) -> str:
    """Make matplotlib's SVG document a part of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    spoken = title if isinstance(title, str) else f"{title.en} · {title.zh}"
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(spoken)}">'
    svg = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own font
    svg = re.sub(r"font: (?:(bold|700) )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, variable in {**VARIABLES, **{_colour(i): f"--series-{i}" for i in range(SERIES)}}.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r">\s+<", "><", svg)
    return opening + re.sub(r"@(\d+)@", lambda match: markup(words[int(match[1])], "tspan"), svg)


def _font(match: re.Match[str]) -> str:
    weight = "; font-weight: 600" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"

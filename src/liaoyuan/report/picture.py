"""A plot as an SVG file of its own, for a document: with its title and legend in the picture, in English."""

import html
import re

from liaoyuan.report.plot import Plot, has_data, legend, svg
from liaoyuan.report.text import asset, plain

SCALE = 1.5  # pixels a point, where the document does not say how large the picture is
POINTS_A_LETTER = 5.6  # of a legend's text, about: the reader's font is not known here
TITLE, ROW, EDGE, SWATCH = 30, 16, 14, 14  # points: height of the title, of a row of the legend; margin; colour and gap


def picture(plot: Plot) -> str:
    """Return the file: one SVG that needs no other, light or dark as the reader's browser is.

    Raises:
        ValueError: the plot has no finite number to draw.
    """
    if not has_data(plot.drawing):
        raise ValueError(f"'{plain(plot.title)}' has nothing to draw")
    body = svg(plot, "p")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert box
    width, height = float(box[1]) + 2 * EDGE, float(box[2])
    key, rows = _legend(plot, width)
    top = TITLE + ROW * rows
    place = f'<svg x="{EDGE}" y="{top}" width="{box[1]}" height="{box[2]}" overflow="visible" '
    sizes = f'viewBox="0 0 {width:g} {top + height:g}" width="{SCALE * width:g}" height="{SCALE * (top + height):g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {sizes}>'
        f'<style>{asset("colours.css")}text {{ font-family: var(--sans); }} [lang="zh"] {{ display: none; }}</style>'
        f'<rect width="100%" height="100%" rx="8" style="fill: var(--paper)"/>'
        f'<text x="{EDGE}" y="20" style="font-size: 11px; font-weight: 600; fill: var(--ink)">'
        f"{html.escape(plain(plot.title))}</text>{key}{body.replace('<svg ', place, 1)}</svg>\n"
    )


def _legend(plot: Plot, width: float) -> tuple[str, int]:
    """Return the legend, as many entries in a row as there is room for, and its number of rows."""
    pieces, x, rows = list[str](), float(EDGE), 1
    entries = legend(plot.drawing)
    for name, colour in entries:
        text = plain(name)
        room = SWATCH + POINTS_A_LETTER * len(text)
        if x > EDGE and x + room > width:
            x, rows = float(EDGE), rows + 1
        y = TITLE + ROW * (rows - 1)
        pieces.append(
            f'<rect x="{x:g}" y="{y}" width="8" height="8" rx="2" style="fill: var(--series-{colour})"/>'
            f'<text x="{x + SWATCH:g}" y="{y + 7.5:g}" style="font-size: 9px; fill: var(--faint)">'
            f"{html.escape(text)}</text>"
        )
        x += room + EDGE
    return "".join(pieces), rows if entries else 0

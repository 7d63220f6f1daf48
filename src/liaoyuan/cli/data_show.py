"""What `data check` and `data convert` found, for people."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from liaoyuan.data.checking import Contents, Shown
    from liaoyuan.data.formats import Tally

SHOWN = 1200  # characters of the example that are shown
MOST = 5  # sources and licences that are shown
MARKS = ("⟦", "⟧")  # around what is learned where there are no colours


def show_tally(tally: "Tally") -> None:
    """Print how many rows became how many records, and what was dropped and left out."""
    from liaoyuan.data.formats import describe

    print(f"  {tally.rows:,} rows -> {tally.records:,} records ({_counts(tally.kinds)})")
    print(f"  layout: {_counts(tally.layouts) or 'none that is known'}")
    for phrase in describe(tally.bad):
        print(f"  dropped: {phrase}")
    for what, places in tally.left_out.items():
        print(f"  left out: {what} ({places.count:,} times, first on line {places.line})")


def show_contents(found: "Contents") -> None:
    """Print what is in a file, and an example with what is learned marked."""
    show_tally(found.tally)
    if found.tally.records:
        print(f"  characters of a record: {_spread(found.characters)}")
        for name, counts in (("source", found.sources), ("licence", found.licences)):
            print(f"  {name}: {_counts(Counter(dict(counts.most_common(MOST))))}")
    if found.first_duplicate:
        line, first = found.first_duplicate
        print(f"  duplicates: {found.duplicates:,} (the first: line {line} says what line {first} says)")
    else:
        print("  duplicates: none")
    if found.tokens:
        _show_tokens(found, found.tokens)
    if found.reason:
        print(f"  nothing to learn: {found.reason}")
    if found.example:
        _show_example(found.example)


def _show_tokens(found: "Contents", tokens: dict[str, Any]) -> None:
    share = 100 * tokens["learned_share"]
    print(f"  tokens: {tokens['tokens']:,}, of which {tokens['learned']:,} ({share:.1f}%) are learned")
    print(f"  tokens of a record: {_spread(tokens['lengths'])}; the longest is on line {tokens['longest']['line']}")
    if tokens["nothing_learned"]:
        print(f"  records of which nothing is learned: {tokens['nothing_learned']:,}")
    if found.unlearned:
        print(f"  answers that the template does not show as they are written: {found.unlearned:,} of {found.turns:,}")
    if found.unshown:
        print(f"  thoughts that the template leaves out: {found.unshown:,} of {found.thoughts:,}")
    for expected, place in tokens["bad"].items():
        if expected not in found.tally.bad:
            print(f"  not learned: line {place['line']}: {place['found']} ({place['count']:,} records)")


def _show_example(example: "Shown") -> None:
    console = Console(highlight=False, soft_wrap=True)
    is_coloured = console.is_terminal and not console.no_color
    text, room = Text(), SHOWN
    for piece, weight in example:
        cut = piece if len(piece) <= room else piece[:room] + "..."
        if weight and not is_coloured:
            cut = f"{MARKS[0]}{cut}{MARKS[1]}"
        text.append(cut, style="bold green" if weight else "dim")
        room -= len(piece)
        if room <= 0:
            break
    told = "in green" if is_coloured else f"between {MARKS[0]} and {MARKS[1]}"
    console.print(f"The first one, what is learned {told}:", markup=False)
    console.print(text)


def _spread(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _counts(counts: "Counter[Any]") -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common() if count)

"""What the console reads of run folders, with what it keeps between two questions: curves read so far, steps unpacked.

Every answer is small: curves have at most so many points, rollouts come a few groups at a time, and a long text in
pieces. Folders may be written, or removed, while they are read.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from liaoyuan.report import Words
from liaoyuan.runs import (
    CHARTS,
    QUIET,
    USUAL,
    Absent,
    Curves,
    Filter,
    Folder,
    Shown,
    Step,
    Steps,
    both,
    chart_of,
    describe,
    find_runs,
    groups_of,
    read_findings,
    read_result,
    run_folder,
    shortened,
    tables_of,
    title_of,
    visible,
)
from liaoyuan.runs.rollouts import CHOICE, LONG_TEXTS

KEPT_CURVES, KEPT_STEPS = 1_000, 4  # runs of which what was read is kept
LIST_SECONDS, LIST_SHARE = 1.0, 20  # for which a list is not looked up anew: in seconds, and in times of a look
SHORT = 1_500  # characters of a text in a list of rollouts
MOST_SAMPLES = 128  # of a group
PIECE = 50_000  # characters of a long text that come at once
SEARCHED = ("text", "thought", "question", "gold", "parsed", "reason", "flaw")
EXCERPT = 60  # characters before and after what was searched
MOST_HITS = 50
SEARCH_SECONDS = 0.4  # after which a search answers with what it has, and from where to go on
MOST_CONFIG = 2**17
Kept = TypeVar("Kept")


class Reading:
    """Answers about the runs in a folder; may be asked from any thread."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lock = folder, threading.RLock()
        self._curves: OrderedDict[str, Curves] = OrderedDict()
        self._steps: OrderedDict[str, Steps] = OrderedDict()
        self._listed: tuple[float, list[dict[str, Any]]] = (-math.inf, [])

    def runs(self) -> dict[str, Any]:
        """Return the runs, newest first. Raises Absent if the folder is gone."""
        with self._lock:
            if time.monotonic() > self._listed[0]:
                began = time.monotonic()
                found = [each for name in find_runs(self._folder) if (each := self._described(name))]
                found.sort(key=lambda run: (-(run["began"] or run["changed"]), run["name"]))
                spent = time.monotonic() - began
                self._listed = began + max(LIST_SECONDS, LIST_SHARE * spent), found
            return {"folder": visible(self._folder.root.resolve().name), "runs": self._listed[1]}

    def _described(self, name: str) -> dict[str, Any] | None:
        try:
            folder = run_folder(self._folder, name)
            curves = self._curves_of(name, folder)
            run = asdict(describe(folder, name, curves))
        except Absent:
            return None  # removed while we looked
        shown = visible(self._folder.root.resolve().name if name == "." else name)
        return run | {"shown": shown, "last": _figures(run["last"]), "version": [curves.rows, curves.changed]}

    def details(self, name: str) -> dict[str, Any]:
        """Return what one run is: findings, result, config, and which figures it has over which axes."""
        with self._lock:
            folder = run_folder(self._folder, name)
            curves = self._curves_of(name, folder)
            known = {each: place for place, each in enumerate(each for chart in CHARTS for each in chart.figures)}
            figures = [each for each in curves.figures() if each not in QUIET]
            return {
                "name": name,
                "figures": _figures(dict.fromkeys(sorted(figures, key=lambda each: known.get(each, 1000)))),
                "axes": curves.axes(),
                "findings": [asdict(each) for each in read_findings(folder)],
                "result": _result(read_result(folder)),
                "config": visible(folder.read("config.toml", most=MOST_CONFIG)),
            }

    def curves(self, names: Sequence[str], figures: Sequence[str], axis: str, most: int) -> dict[str, Any]:
        """Return {run: {figure: [x, y]}}; a run that is gone, and a figure that a run lacks, are left out."""
        found: dict[str, dict[str, list[list[float]]]] = {}
        with self._lock:
            for name in dict.fromkeys(names):
                try:
                    curves = self._curves_of(name, run_folder(self._folder, name))
                except Absent:
                    continue
                each = {figure: curves.curve(figure, axis, most) for figure in figures}
                found[name] = {figure: [curve.x, curve.y] for figure, curve in each.items() if curve.x}
        return {"axis": axis, "curves": found}

    def steps(self, name: str) -> list[int]:
        """Return the steps of a run that have rollouts."""
        with self._lock:
            return self._steps_of(name).numbers()

    def rollouts(
        self, name: str, number: int, wanted: Filter, offset: int, limit: int, group: int | None
    ) -> dict[str, Any]:
        """Return `limit` groups of a step in which a rollout is wanted, from `offset` or where `group` is among them.

        Raises Absent if there is no such step.
        """
        with self._lock:
            step = self._steps_of(name).read(number)
        matching = [each for each in groups_of(step.rollouts) if any(map(wanted, each))]
        if group is not None:
            place = next((place for place, each in enumerate(matching) if each[0].group == group), 0)
            offset = place // limit * limit
        places = {id(one): place for place, one in enumerate(step.rollouts)}
        return {
            "step": number,
            "offset": offset,
            "groups": [_group(each, wanted, places) for each in matching[offset : offset + limit]],
            "matching": len(matching),
            "rollouts": sum(wanted(one) for one in step.rollouts),
            **_choices(step),
        }

    def text(self, name: str, number: int, place: int, field: str, offset: int) -> dict[str, Any]:
        """Return a piece of one text of the rollout at `place` of a step, and how long the text is."""
        with self._lock:
            rollouts = self._steps_of(name).read(number).rollouts
        if place >= len(rollouts) or field not in (*LONG_TEXTS, "flaw", "task", "problem"):
            raise Absent(f"Step {number} has no such text.")
        whole = getattr(rollouts[place], field) or ""
        return {"text": whole[offset : offset + PIECE], "length": len(whole)}

    def search(self, name: str, wanted: Filter, begin: int) -> dict[str, Any]:
        """Return wanted rollouts of all steps from `begin` on, and as "next" the step to go on from (None: no more)."""
        hits: list[dict[str, Any]] = []
        until = time.monotonic() + SEARCH_SECONDS
        with self._lock:
            steps = self._steps_of(name)
        for number in [each for each in steps.numbers() if each >= begin]:
            if len(hits) >= MOST_HITS or time.monotonic() > until:
                return {"hits": hits, "next": number}
            try:
                with self._lock:
                    step = steps.read(number)
            except Absent:
                continue
            hits += _hits([one for one in step.rollouts if wanted(one)], wanted.words)[: 4 * MOST_HITS]
        return {"hits": hits, "next": None}

    def _curves_of(self, name: str, folder: Folder) -> Curves:
        return _kept(self._curves, name, lambda: Curves(folder), KEPT_CURVES).follow()

    def _steps_of(self, name: str) -> Steps:
        folder = run_folder(self._folder, name)
        return _kept(self._steps, name, lambda: Steps(folder), KEPT_STEPS)


def _kept(store: OrderedDict[str, Kept], name: str, make: Callable[[], Kept], most: int) -> Kept:
    """Return what is kept under a name, made now if it is not, and forget what was not asked for the longest."""
    if name not in store:
        store[name] = make()
    store.move_to_end(name)
    while len(store) > most:
        store.popitem(last=False)
    return store[name]


def _figures(values: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return the figures with what they are called and their values."""
    found = []
    for name, value in values.items():
        chart = chart_of(name)
        percent = bool(chart and chart.percent)
        found.append({"name": name, "title": _both(title_of(name)), "percent": percent, "usual": name in USUAL})
        if chart:
            found[-1]["unit"] = _both(chart.unit)
        if value is not None:
            found[-1]["value"] = value
    return found


def _both(words: Words) -> dict[str, str]:
    return dict(zip(("en", "zh"), map(visible, both(words)), strict=True))


def _group(rollouts: Sequence[Shown], wanted: Filter, places: dict[int, int]) -> dict[str, Any]:
    first, long = shortened(rollouts[0], SHORT)
    shared = {name: getattr(first, name) for name in ("group", "problem", "task", "level", "question", "gold")}
    common = ("step", *shared)
    samples = []
    for one in rollouts[:MOST_SAMPLES]:
        short, cut = shortened(one, SHORT)
        own = {name: value for name, value in asdict(short).items() if name not in common}
        cut = {name: length for name, length in cut.items() if name in own}
        samples.append(own | {"verdict": one.verdict, "place": places[id(one)], "wanted": wanted(one), "long": cut})
    long = {name: length for name, length in long.items() if name in shared}
    left_out = len(rollouts) - len(samples)
    return shared | {"place": places[id(rollouts[0])], "long": long, "samples": samples, "left_out": left_out}


def _choices(step: Step) -> dict[str, Any]:
    """Return by what a step's rollouts can be told apart, and how many there are of each verdict."""
    verdicts = [one.verdict for one in step.rollouts]
    return {
        "all": len(step.rollouts),
        "verdicts": {name: verdicts.count(name) for name in ("right", "partly", "wrong", "unjudged")},
        "levels": sorted({one.level for one in step.rollouts if one.level is not None})[:100],
        "tasks": sorted({one.task[:CHOICE] for one in step.rollouts if one.task})[:100],
        "flaws": sorted({one.flaw[:CHOICE] for one in step.rollouts if one.flaw})[:100],
        "unread": step.unread,
        "whole": step.whole,
    }


def _hits(rollouts: Sequence[Shown], words: str) -> list[dict[str, Any]]:
    """Return where rollouts are, with the words around what was searched; one of a group if its prompt has them."""
    hits: list[dict[str, Any]] = []
    asked = set[int]()
    for one in rollouts:
        name = next((name for name in SEARCHED if words.lower() in (getattr(one, name) or "").lower()), SEARCHED[0])
        if name == "question" and words and one.group in asked:
            continue
        asked |= {one.group} if name == "question" else set()
        where = {"step": one.step, "group": one.group, "sample": one.sample, "verdict": one.verdict}
        hits.append(where | {"excerpt": _around(getattr(one, name) or "", words)})
    return hits


def _around(text: str, words: str) -> str:
    at = max(0, text.lower().find(words.lower()))
    begin = max(0, at - EXCERPT)
    return ("…" if begin else "") + text[begin : at + len(words) + EXCERPT][: 4 * EXCERPT]


def _result(result: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of a result."""
    found = tables_of(result)
    tables = []
    for table in found.tables:
        rows = [{"name": _both(row), "figures": [asdict(each) for each in figures]} for row, figures in table.rows]
        tables.append({"title": _both(table.title), "columns": [*map(_both, table.columns)], "rows": rows})
    return {"tables": tables, "facts": [{"name": _both(name), "value": value} for name, value in found.facts]}

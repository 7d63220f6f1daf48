"""`report.html` of a run: where it is, what the doctor found, its curves, how it ended, rollouts and config.

Several runs on one page are drawn over each other, a colour each. The page is made from the run folders alone, so it
can be made while they are being written, and again at any time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from liaoyuan import report
from liaoyuan.report import Part, Text, Words
from liaoyuan.runs.charts import CHARTS, QUIET, Chart, both, title_of
from liaoyuan.runs.curves import Curves
from liaoyuan.runs.folder import Absent, Folder
from liaoyuan.runs.result import Figure, tables_of
from liaoyuan.runs.rollouts import Shown, Steps, groups_of
from liaoyuan.runs.run import CONFIG, Finding, Run, State, describe, read_findings, read_result
from liaoyuan.runs.text import visible

REFRESH_SECONDS = 20
MOST_OTHERS = 8  # curves of columns that have no name here
MOST_CHARACTERS = 2_000  # of a rollout
MOST_CONFIG = 2**17  # bytes
SIDES = 3  # answers of a group
KINDS: dict[str, Text] = {
    "rl": Text("reinforcement learning", "强化学习"),
    "dpo": Text("preference optimisation", "偏好优化"),
    "sft": Text("supervised fine-tuning", "监督微调"),
    "pretrain": Text("pretraining", "预训练"),
    "run": Text("run", "运行"),
}
STATES: dict[State, Text] = {
    "running": Text("running", "运行中"),
    "stopped": Text("stopped before its end: the same command goes on", "未到终点即停止：重跑同一命令即可继续"),
    "ended": Text("ended", "已结束"),
}
SEVERITY: dict[str, Text] = {
    "error": Text("✗ error", "✗ 错误"),
    "warning": Text("! warning", "! 警告"),
    "note": Text("· note", "· 提示"),
}


@dataclass(frozen=True)
class _Seen:
    """A run with what was read of it."""

    folder: Folder
    run: Run
    curves: Curves
    findings: list[Finding]


def run_page(folders: Mapping[str, Folder], state: State | None = None) -> report.Page:
    """Return the page of runs by their names.

    state: of a single run, where it is known; see `describe`.
    """
    seen = [_look(name, folder, state) for name, folder in folders.items()]
    parts = [
        report.Section("", [report.KeyFigures(_key_figures(seen[0]))] if len(seen) == 1 else [_table(seen)]),
        report.Section(Text("What the doctor found", "诊断所见"), [_findings(seen)] if any(_found(seen)) else []),
        report.Section(Text("How it was measured at the end", "最终测量结果"), list(_results(seen))),
        report.Section(Text("Curves", "曲线"), _plots(seen)),
        report.Section(Text("What it writes", "它写了什么"), _rollouts(seen[0]) if len(seen) == 1 else []),
        report.Section(Text("How it was made", "如何得到"), _configs(seen)),
    ]
    running = any(each.run.state == "running" for each in seen)
    return report.Page(
        title=_title(seen),
        subtitle=_subtitle(seen),
        sections=[section for section in parts if section.parts],
        refresh_seconds=REFRESH_SECONDS if running else None,
    )


def _look(name: str, folder: Folder, state: State | None) -> _Seen:
    curves = Curves(folder).follow()
    return _Seen(folder, describe(folder, visible(name), curves, state), curves, read_findings(folder))


def _title(seen: Sequence[_Seen]) -> Words:
    if len(seen) == 1:
        kind = KINDS[seen[0].run.kind]
        return Text(f"{kind.en.capitalize()}: {seen[0].run.name}", f"{kind.zh}：{seen[0].run.name}")
    return Text(f"{len(seen)} runs compared", f"{len(seen)} 次运行的比较")


def _subtitle(seen: Sequence[_Seen]) -> Words:
    if len(seen) > 1:
        return Text("Each run has its colour in every plot.", "每次运行在所有图中颜色一致。")
    run = seen[0].run
    steps = _steps(run)
    return Text(f"{steps.en}, {STATES[run.state].en}.", f"{steps.zh}，{STATES[run.state].zh}。")


def _steps(run: Run) -> Text:
    if run.total is None:
        return Text(f"{run.done:,} steps", f"{run.done:,} 步")
    return Text(f"{run.done:,} of {run.total:,} steps", f"{run.total:,} 步中的 {run.done:,} 步")


def _key_figures(one: _Seen) -> list[report.Figure]:
    figures = []
    for name, value in list(one.run.last.items())[:2]:
        first = next((value for value in one.curves.curve(name).y), None)
        note = Text(f"{_number(name, first)} at first", f"最初为 {_number(name, first)}") if first is not None else ""
        figures.append(report.Figure(_number(name, value), title_of(name), note))
    figures.append(report.Figure(f"{one.run.done:,}", Text("steps done", "已完成步数"), _steps(one.run)))
    seconds = one.curves.last("cpu_seconds")
    if seconds is not None:
        figures.append(report.Figure(_duration(seconds), Text("of CPU time", "CPU 时间")))
    return figures


def _number(name: str, value: float) -> str:
    percent = any(name in chart.figures and chart.percent for chart in CHARTS)
    return f"{100 * value:.1f}%" if percent else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _table(seen: Sequence[_Seen]) -> report.Table:
    names = list(dict.fromkeys(name for each in seen for name in each.run.last))
    header: list[Words] = [Text("run", "运行"), Text("kind", "种类"), Text("steps", "步"), *map(title_of, names)]
    rows: list[list[Words]] = []
    for each in seen:
        last = [_number(name, each.run.last[name]) if name in each.run.last else "–" for name in names]
        total = "" if each.run.total is None else f"/{each.run.total:,}"
        rows.append([each.run.name, KINDS[each.run.kind], f"{each.run.done:,}{total}", *last])
    return report.Table(header, rows)


def _found(seen: Sequence[_Seen]) -> Iterator[tuple[_Seen, Finding]]:
    yield from ((each, finding) for each in seen for finding in each.findings)


def _findings(seen: Sequence[_Seen]) -> report.Table:
    header: list[Words] = ["", Text("what", "所见"), Text("what to do", "如何处理"), Text("step", "步")]
    if len(seen) > 1:
        header.append(Text("run", "运行"))
    rows: list[list[Words]] = []
    for each, found in _found(seen):
        steps = f"{found.first}" if found.times == 1 else f"{found.first}–{found.last} ({found.times}×)"
        row: list[Words] = [SEVERITY[found.severity], found.what or found.name, found.do, steps]
        rows.append([*row, each.run.name] if len(seen) > 1 else row)
    return report.Table(header, rows, left=True)


def _results(seen: Sequence[_Seen]) -> Iterator[Part]:
    for each in seen:
        result = tables_of(read_result(each.folder))
        name = f"{each.run.name}: " if len(seen) > 1 else ""
        for table in result.tables:
            title = Text(*(f"{name}{words}" for words in both(table.title)))
            rows = [[row, *map(_cell, figures)] for row, figures in table.rows]
            yield report.Table([title, *table.columns], rows)
        if result.facts:
            yield report.Table([each.run.name, ""], [list(fact) for fact in result.facts], left=True)


def _cell(figure: Figure) -> report.Cell:
    if figure.interval is None:
        return figure.value
    low, high = figure.interval
    return report.Noted(figure.value, Text(f"{low} to {high}", f"{low} 至 {high}"))


def _plots(seen: Sequence[_Seen]) -> list[Part]:
    """Return a plot for each chart of one run; for several, a plot for each figure with a line for each run."""
    known = {name for chart in CHARTS for name in chart.figures} | QUIET
    others = dict.fromkeys(name for each in seen for name in each.curves.figures() if name not in known)
    unnamed = [Chart(Text(name, name), Text("", ""), {name: name}) for name in map(visible, others)]
    charts = [*CHARTS, *unnamed[:MOST_OTHERS]]
    if len(seen) > 1:
        charts = [_alone(chart, name) for chart in charts for name in chart.figures]
    plots = (_plot(chart, seen) for chart in charts)
    return [plot for plot in plots if plot is not None]


def _alone(chart: Chart, name: str) -> Chart:
    return Chart(Text(*both(title_of(name))), chart.unit, {name: chart.figures[name]}, chart.percent, chart.log_y)


def _plot(chart: Chart, seen: Sequence[_Seen]) -> report.Plot | None:
    lines: list[report.Line] = []
    drawn = chart
    for place, each in enumerate(seen):
        for name, words in chart.figures.items():
            curve = each.curves.curve(name, most=600)
            label = each.run.name if len(seen) > 1 else words
            if curve.y:
                drawn = chart if lines else _alone(chart, name)  # one line has no legend: the title says which
                lines.append(report.Line(label, curve.x, curve.y, colour=place if len(seen) > 1 else None))
    if not lines:
        return None
    smooth = max(1, max(len(line.x) for line in lines) // 40)
    drawing = report.Lines(Text("step", "步"), chart.unit, lines, smooth, chart.percent, chart.log_y)
    return report.Plot(drawn.title, drawing)


def _rollouts(one: _Seen) -> list[Part]:
    """Return a group of the first step and one of the last, of which the answers differ in reward if one does."""
    steps = Steps(one.folder)
    numbers = steps.numbers()
    parts: list[Part] = []
    for number in dict.fromkeys(numbers[:1] + numbers[-1:]):
        try:
            groups = groups_of(steps.read(number).rollouts)
        except Absent:
            continue
        mixed = [group for group in groups if len({one.reward for one in group}) > 1]
        parts += [_answers(number, group) for group in (mixed or groups)[:1]]
    return parts


def _answers(step: int, group: Sequence[Shown]) -> report.Answers:
    order = sorted(group, key=lambda one: math.inf if one.reward is None else -one.reward)
    chosen = [order[0], *order[1:-1][: SIDES - 2], order[-1]] if len(order) > 1 else order
    sides = []
    for one in chosen:
        worth = "–" if one.reward is None else f"{one.reward:g}"
        name = Text(f"step {step}: reward {worth}", f"第 {step} 步：奖励 {worth}")
        right = {"right": True, "wrong": False}.get(one.verdict)
        written = f"{one.thought} → {one.text}" if one.thought else one.text
        sides.append(report.Side(name, written[:MOST_CHARACTERS], right))
    first = group[0]
    return report.Answers(first.question[:MOST_CHARACTERS], first.gold[:MOST_CHARACTERS], sides)


def _configs(seen: Sequence[_Seen]) -> list[Part]:
    parts: list[Part] = []
    for each in seen:
        config = visible(each.folder.read(CONFIG, most=MOST_CONFIG))
        names = ("", "") if len(seen) == 1 else (f" of {each.run.name}", f"（{each.run.name}）")
        title = Text(f"The resolved config.toml{names[0]}", f"解析后的 config.toml{names[1]}")
        parts += [report.Code(title, config)] if config else []
    return parts

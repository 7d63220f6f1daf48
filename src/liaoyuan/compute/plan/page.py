"""A plan as a page: the step on its streams, the memory over the step, what one waits for, and what it rests on."""

import re
from collections.abc import Sequence

from liaoyuan.compute.plan.goodput import Goodput
from liaoyuan.compute.plan.machine.cluster import GIB
from liaoyuan.compute.plan.search.reasons import Reason
from liaoyuan.compute.plan.search.search import Ranking
from liaoyuan.compute.plan.span import Span
from liaoyuan.compute.plan.step.predict import Memory, Prediction
from liaoyuan.compute.plan.step.step_time import Bar
from liaoyuan.report import Bar as PlotBar
from liaoyuan.report import (
    Bars,
    Cell,
    Figure,
    Gantt,
    Interval,
    Intervals,
    KeyFigures,
    Line,
    Lines,
    Noted,
    Page,
    Paragraph,
    Part,
    Plot,
    Section,
    Stretch,
    Table,
    Text,
    Words,
)

TITLE = Text("Before it runs", "运行之前")
SHOWN = 8  # parts of the memory at the peak
ROWS = 12  # layouts of the ranking
KINDS: tuple[Words, ...] = (  # of what goes on, in the order of their colours
    Text("forward", "前向"),
    Text("backward", "反向"),
    Text("update", "更新"),
    Text("messages", "通信"),
    Text("launch and copies", "下发与拷贝"),
)
FORWARD, BACKWARD, UPDATE, MESSAGE, HOST = range(len(KINDS))
WAITING = {
    "bubble": Text("pipeline (bubble)", "流水线（气泡）"),
    "launch": Text("host (launch)", "主机（下发）"),
}


def plan_page(told: str, found: Prediction, more: Sequence[Section] = ()) -> Page:
    """Return the page of a prediction with details.

    told: the job in words. more: sections that follow, such as a ranking or what failures cost.
    """
    return Page(
        TITLE,
        [
            Section("", [_figures(found), Paragraph(_rests(found))]),
            Section(Text("The step", "这一步"), _step(found)),
            Section(Text("Memory", "显存"), _memory(found.memory)),
            *more,
            Section(Text("How sure it is", "把握有多大"), [_width(found)]),
        ],
        told,
    )


def _figures(found: Prediction) -> KeyFigures:
    fullest = max(found.memory, key=lambda one: one.total.median / one.room)
    share = fullest.total.median / fullest.room
    return KeyFigures(
        [
            Figure(f"{found.step.seconds.median:.3g} s", Text("a step", "每步"), _interval(found.step.seconds, " s")),
            Figure(
                f"{found.tokens_per_second.median:,.0f}",
                Text("tokens/s of a card", "每卡每秒 token"),
                _interval(found.tokens_per_second),
            ),
            Figure(
                f"{found.model_utilisation.median:.1%}",
                Text("model FLOP utilisation", "模型算力利用率"),
                Text(
                    f"{found.hardware_utilisation.median:.1%} with what is computed again",
                    f"含重算为 {found.hardware_utilisation.median:.1%}",
                ),
            ),
            Figure(
                f"{share:.0%}",
                Text("of a card's memory", "占单卡显存"),
                Text("it fits", "放得下") if found.fits else Text("it does NOT fit", "放不下"),
            ),
        ]
    )


def _rests(found: Prediction) -> Text:
    return Text(
        f"Intervals hold 90% of what may be. They rest on {found.rests_on}.",
        f"区间覆盖 90% 的可能。依据：{found.rests_on}。",
    )


def _interval(span: Span, unit: str = "") -> Text:
    low, high = _number(span.low), _number(span.high)
    return Text(f"{low} to {high}{unit}", f"{low} 至 {high}{unit}")


def _step(found: Prediction) -> list[Part]:
    computing, whole = found.step.computing, found.step.seconds.median
    exposed = sorted(found.step.exposed.items(), key=lambda item: -item[1])
    bars = [PlotBar(Text("computing", "计算"), computing, f"{computing / whole:.1%}", strong=True)]
    bars += [
        PlotBar(WAITING.get(axis, Text(f"messages of {axis}", f"{axis} 的通信")), seconds, f"{seconds / whole:.1%}")
        for axis, seconds in exposed
        if seconds > 0
    ]
    title = Text("Computing, and what it waits for", "计算与等待")
    return [*_charts(found.step.bars), Plot(title, Bars(Text("share of the step", "占这一步"), bars), wide=True)]


def _charts(bars: Sequence[Bar]) -> list[Part]:
    """Return the step as a Gantt chart of streams."""
    streams = list(dict.fromkeys(bar.stream for bar in bars))
    if not streams:
        return []
    stretches = [Stretch(streams.index(bar.stream), kind_of(bar), bar.begin, bar.end) for bar in bars]
    used = sorted({stretch.kind for stretch in stretches})
    stretches = [Stretch(one.row, used.index(one.kind), one.begin, one.end) for one in stretches]
    drawing = Gantt(Text("seconds", "秒"), streams, [KINDS[kind] for kind in used], stretches)
    note = Text("Of few layers and microbatches: all others are like them.", "仅示少数层与微批：其余与之相同。")
    return [Plot(Text("What goes on when", "何时做什么"), drawing, note if "compute" in streams else "", wide=True)]


def kind_of(bar: Bar) -> int:
    """Return which of `KINDS` a bar is of, by its stream and name."""
    if re.search(r"\b(host|launch|copy)\b", bar.stream):
        return HOST
    if not re.search(r"\b(compute|stage)\b", bar.stream):
        return MESSAGE
    if re.match(r"backward|input|weight", bar.name):
        return BACKWARD
    return UPDATE if bar.name.startswith("update") else FORWARD


def _memory(memory: Sequence[Memory]) -> list[Part]:
    lines = [
        Line(one.stage, [second for second, _ in one.timeline], [size / GIB for _, size in one.timeline])
        for one in memory
        if one.timeline
    ]
    parts: list[Part] = []
    if lines:
        last = max(line.x[-1] for line in lines)
        lines.append(Line(Text("room", "可用"), [0.0, last], [memory[0].room / GIB] * 2, colour=4))
        title = Text("Tensors over the step", "一步之中的张量")
        parts.append(Plot(title, Lines(Text("seconds", "秒"), "GiB", lines), wide=True))
    return parts + [_held(one) for one in memory]


def _held(one: Memory) -> Table:
    rows: list[Sequence[Cell]] = [
        (f"{part.module or 'the model'}: {part.operator}", part.phase, f"{part.bytes / GIB:,.2f}")
        for part in one.held[:SHOWN]
    ]
    rest = one.tensors - sum(part.bytes for part in one.held[:SHOWN])
    if rest > 0:
        rows.append((Text("all else", "其余"), "", f"{rest / GIB:,.2f}"))
    rows += [(name, Text("allowance", "预留"), f"{span.median / GIB:,.2f}") for name, span in one.allowance.items()]
    rows.append((Text("together", "合计"), "", f"{one.total.median / GIB:,.2f}"))
    header = (Text(f"at the peak: {one.stage}", f"峰值：{one.stage}"), "", "GiB")
    note = Text(f"The card has {one.room / GIB:,.2f} GiB for them.", f"单卡可用 {one.room / GIB:,.2f} GiB。")
    return Table(header, rows, note)


def _width(found: Prediction) -> Plot:
    bars = [PlotBar(name, share, f"{share:.0%}") for name, share in list(found.width.items())[:SHOWN] if share > 0]
    return Plot(
        Text("Which figure the interval of the step comes from", "步时区间来自哪些量"),
        Bars(Text("share of its variance", "占其方差"), bars),
        Text(
            "Figures of cards and links, by their names in the profile. `liaoyuan plan calibrate` narrows them.",
            "卡与链路的各项参数，名称同设备画像。`liaoyuan plan calibrate` 可使其收窄。",
        ),
        wide=True,
    )


def ranking_section(ranking: Ranking, told: Sequence[Reason]) -> Section:
    """Return the best layouts in a table, and why not the neighbours of the best."""
    header: list[Words] = [
        Text("layout", "布局"),
        Text("microbatches", "微批数"),
        Text("recompute", "重算"),
        Text("s a step", "秒每步"),
        Text("memory", "显存"),
        Text("bubble", "气泡"),
    ]
    rows: list[Sequence[Cell]] = []
    for choice in ranking.choices[: max(ranking.whole, 1)][:ROWS]:
        found = choice.found
        note = _interval(found.seconds) if found else Text("by formulas", "按公式")
        waits = found.exposed if found else choice.estimate.exposed
        rows.append(
            (
                choice.job.layout.describe() + (f", {choice.job.layout.schedule}" if choice.job.layout.pp > 1 else ""),
                str(choice.job.train.microbatches),
                choice.job.layout.recompute,
                Noted(f"{choice.seconds:.4g}", note),
                f"{choice.memory_share(ranking.cluster):.0%}",
                f"{waits.get('bubble', 0.0) / choice.seconds:.1%}",
            )
        )
    looked = Text(
        f"{ranking.legal:,} layouts are legal; {ranking.too_large:,} hold too much, {ranking.too_slow:,} cannot be as "
        f"fast as the best; {ranking.whole:,} were predicted as a whole.",
        f"合法布局 {ranking.legal:,} 个；其中 {ranking.too_large:,} 个放不下，{ranking.too_slow:,} 个不可能快过最优者；"
        f"{ranking.whole:,} 个做了完整预测。",
    )
    reasons = Table(
        (Text("why not its neighbours", "为何不是邻近布局"), ""),
        [(one.neighbour, one.sentence) for one in told],
        left=True,
    )
    return Section(Text("The best layouts", "最优布局"), [Table(header, rows, looked), reasons])


def goodput_section(found: Goodput) -> Section:
    """Return what failures make of the job."""
    rows = [(name, share) for name, (_, share) in found.losses.items() if share.high > 0]
    figures = KeyFigures(
        [
            Figure(f"{found.days.median:.3g}", Text("days to finish", "完成所需天数"), _lived(found.days)),
            Figure(f"{found.ideal_days.median:.3g}", Text("if nothing failed", "若无故障"), _lived(found.ideal_days)),
            Figure(
                f"{found.ettr.median:.1%}",
                Text("effective training time", "有效训练时间占比"),
                Text(
                    f"{found.ettr.low:.1%} to {found.ettr.high:.1%}", f"{found.ettr.low:.1%} 至 {found.ettr.high:.1%}"
                ),
            ),
            Figure(
                f"{_number(found.mtbf_hours.median)} h", Text("between failures", "故障间隔"), _lived(found.mtbf_hours)
            ),
        ]
    )
    drawing = Intervals(
        Text("share of the time, %", "占时间，%"),
        [name for name, _ in rows],
        [Text("lost", "损失")],
        [[Interval(share.median, share.low, share.high) for _, share in rows]],
    )
    return Section(
        Text("Among failures", "有故障时"),
        [figures, Plot(Text("Where time is lost", "时间损失在哪里"), drawing, wide=True)],
    )


def _lived(found: Span) -> Text:
    low, high = _number(found.low), _number(found.high)
    return Text(f"{low} to {high}", f"{low} 至 {high}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

"""A profile as a page: the step as bars, the products under their roof, and every operator in a table."""

from collections.abc import Sequence

from liaoyuan.compute.profile import OperatorTime, Profile, grouped
from liaoyuan.report import Bar, Bars, Cell, Line, Page, Paragraph, Plot, Point, Points, Section, Table, Text, Words

MOST_BARS = 16
LOW = 0.5  # share of the roof below which a bar is coloured
PHASES = {
    "forward": Text("forward", "前向"),
    "backward": Text("backward", "反向"),
    "update": Text("update", "更新"),
}
BETWEEN = Text("between operators", "算子之间")
MEASURING = Text("measuring", "测量本身")


def profile_page(found: Profile) -> Page:
    """Return the page of a profile."""
    rows = grouped(found.operators)
    facts = found.facts
    told = f"{facts['subject']}, {facts['mode']}, {facts['dtype']}, {facts['device']}, {facts['tokens']:,} tokens"
    return Page(
        Text("Where a step's time goes", "一步的时间花在哪里"),
        [
            Section("", [Paragraph(_summary(found)), _bars(found, rows), _roofline(found, rows)]),
            Section(Text("Operators", "算子"), [_table(found, rows)]),
        ],
        told,
    )


def _summary(found: Profile) -> Text:
    step, plain = 1e3 * found.step_seconds, 1e3 * found.plain_step_seconds
    return Text(
        f"A step: {plain:.2f} ms; {step:.2f} ms with a clock around every operator: the fastest of {found.steps}.",
        f"一步耗时 {plain:.2f} 毫秒；为每个算子计时时为 {step:.2f} 毫秒。均取 {found.steps} 次中最快的一次。",
    )


def _bars(found: Profile, rows: Sequence[OperatorTime]) -> Plot:
    bars = [
        Bar(
            _name(row),
            row.seconds,
            f"{found.share(row.seconds):.0%}" + (f" / {row.roof_share:.0%}" if row.roof_seconds else ""),
            0 < row.roof_share < LOW,
        )
        for row in rows[:MOST_BARS]
    ]
    rest = sum(row.seconds for row in rows[MOST_BARS:])
    others = ((Text("other operators", "其他算子"), rest), (BETWEEN, found.between_seconds))
    bars += [
        Bar(name, value, f"{found.share(value):.0%}") for name, value in (*others, (MEASURING, found.measuring_seconds))
    ]
    note = Text(
        "Coloured: less than half of what its FLOPs and bytes allow.", "着色者：不足其运算量与访存量所允许的一半。"
    )
    return Plot(
        Text("The step", "这一步"),
        Bars(Text("share of the step / share of the roof", "占这一步 / 达屋顶"), bars),
        note,
        wide=True,
    )


def _roofline(found: Profile, rows: Sequence[OperatorTime]) -> Plot:
    """Draw the operators that have products, under the roof of each dtype."""
    points = [
        Point(row.operator, row.flops / row.traffic, row.flops / row.seconds / 1e9)
        for row in rows
        if row.flops and row.traffic and row.seconds
    ]
    memory = found.rates["memory"]
    curves = []
    for dtype, rate in found.rates.items():
        if dtype == "memory":
            continue
        ridge = rate / memory
        xs = [min([ridge / 4, *(point.x for point in points)]), ridge, max([ridge * 4, *(point.x for point in points)])]
        curves.append(Line(dtype, xs, [min(rate, x * memory) / 1e9 for x in xs]))
    drawing = Points(Text("FLOPs per byte", "每字节运算量"), "GFLOP/s", points, curves)
    note = Text(
        "Lines: the best rates of products and copies measured after the steps. Bytes are those of memory; what stays "
        "in a cache can lie above the slope.",
        "线：各步之后实测的矩阵乘与拷贝最高速率。字节按内存计；留在缓存中的可高于斜线。",
    )
    return Plot(
        Text("Operators with matrix products, under the roof", "含矩阵乘的算子与屋顶线"), drawing, note, wide=True
    )


def _table(found: Profile, rows: Sequence[OperatorTime]) -> Table:
    header: list[Words] = [
        Text("operator", "算子"),
        Text("phase", "阶段"),
        Text("calls", "次数"),
        Text("ms", "毫秒"),
        Text("of the step", "占比"),
        Text("of the roof", "达屋顶"),
        "GFLOP",
        "MB",
    ]
    lines: list[Sequence[Cell]] = [
        (
            row.operator,
            PHASES[row.phase],
            f"{row.calls:,.0f}",
            f"{1e3 * row.seconds:.3f}",
            f"{found.share(row.seconds):.1%}",
            f"{row.roof_share:.0%}" if row.roof_seconds else "–",
            f"{row.flops / 1e9:.3f}" if row.flops else "–",
            f"{row.traffic / 1e6:.2f}",
        )
        for row in rows
    ]
    for name, seconds in ((BETWEEN, found.between_seconds), (MEASURING, found.measuring_seconds)):
        lines.append((name, "", "", f"{1e3 * seconds:.3f}", f"{found.share(seconds):.1%}", "–", "–", "–"))
    return Table(header, lines)


def _name(row: OperatorTime) -> Text:
    phase = PHASES[row.phase]
    name = row.operator
    return Text(name, name) if name.endswith("_backward") else Text(f"{name}, {phase.en}", f"{name}，{phase.zh}")

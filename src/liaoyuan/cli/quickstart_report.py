"""The quickstart's `report.html`, from what the run folder holds: `summary.json`, metrics files, `config.toml`.

The keys of `summary.json` are described in `liaoyuan.cli.summary`; the report shows those that are there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liaoyuan import report
from liaoyuan.cli.summary import (
    CLAIMED,
    COLOURS,
    CORPUS,
    MEASURES,
    MODEL,
    STAGES,
    STEPS,
    TITLES,
    Summary,
    as_interval,
    cell,
    duration,
    grouped,
    interval,
    measured,
    number,
    percent,
)
from liaoyuan.report import Cell, Part, Text, Words
from liaoyuan.rundir import read_json, read_metrics, write_atomic
from liaoyuan.tuning.summary import CONTROLS

QUICKSTART = Text(
    "One run of the Liaoyuan quickstart: a tokenizer and a language model from raw text, taught to reason,"
    " measured against controls that were given the same compute.",
    "燎原快速上手的一次完整运行：从原始文本得到分词器和语言模型，再学会推理，并与获得同等算力的对照组比较。",
)


def write_report(run_folder: Path, subtitle: Words = QUICKSTART) -> Path:
    """Write `run_folder/report.html` from `run_folder/summary.json` and return its path.

    Raises:
        LiaoyuanError: there is no summary.json, or it is torn.
    """
    summary = read_json(run_folder / "summary.json")
    path = run_folder / "report.html"
    write_atomic(path, page(summary, run_folder, subtitle).html())
    return path


def page(summary: Summary, run_folder: Path, subtitle: Words = QUICKSTART) -> report.Page:
    """Return the report as a page; `run_folder` is where metrics files and `config.toml` are read."""
    sections = [
        report.Section("", [report.KeyFigures(_key_figures(summary))]),
        _thinking(summary, run_folder),
        _samples(summary),
        _language(summary, run_folder),
        _provenance(summary, run_folder),
    ]
    return report.Page(
        title=Text("From text to a model that thinks", "从文本到会思考的模型"),
        subtitle=subtitle,
        sections=[section for section in sections if section.parts],
    )


def _key_figures(summary: Summary) -> list[report.Figure]:
    figures = []
    difference = measured(summary, "accuracy", "difference", "greedy")
    if difference:
        label = Text("points: RL minus the better control", "百分点：强化学习减较好对照组")
        figures.append(report.Figure(f"{100 * difference.mean:+.1f}", label, interval(difference, 100.0)))
    right = measured(summary, "accuracy", "rl", "greedy")
    if right:
        note = interval(right, 100.0, "%")
        figures.append(
            report.Figure(f"{100 * right.mean:.1f}%", Text("of held-out problems right", "留出题正确率"), note)
        )
    ours, xz = number(summary, "bits_per_byte", "model"), number(summary, "bits_per_byte", "xz")
    if ours is not None:
        note = Text(f"xz -9 needs {xz:.3f}", f"xz -9 需要 {xz:.3f}") if xz is not None else ""
        figures.append(report.Figure(f"{ours:.3f}", Text("bits per byte of unseen text", "未见文本每字节比特数"), note))
    seconds, seeds = number(summary, "seconds"), summary.get("seeds")
    if seconds is not None:
        note = Text(f"whole run, seeds: {seeds}", f"全程，随机种子数：{seeds}") if seeds else ""
        figures.append(report.Figure(duration(seconds, exact=False), Text("wall time", "总用时"), note))
    return figures


def _thinking(summary: Summary, run_folder: Path) -> report.Section:
    parts: list[Part] = []
    stages = [stage for stage in STAGES if stage in summary.get("accuracy", {})]
    if stages:
        parts += [report.Paragraph(_claim(summary)), _accuracy_table(summary, stages)]
    if measured(summary, "accuracy", "difference", "greedy"):
        parts.append(_difference_plot(summary))
    if summary.get("accuracy_by_level"):
        parts.append(_level_plot(summary["accuracy_by_level"]))
    if summary.get("accuracy_by_length"):
        parts.append(_length_plot(summary["accuracy_by_length"]))
    if stages:
        parts.append(_accuracy_plot(summary, stages))
    parts += _rl_plots(summary, run_folder)
    if summary.get("compute"):
        parts.append(_compute_table(summary["compute"]))
    return report.Section(Text("Learning to think", "学会思考"), parts)


def _rl_plots(summary: Summary, run_folder: Path) -> list[Part]:
    plots: list[Part] = []
    reward = _curves(summary, run_folder, "rl", "reward")
    if reward:
        y_label = Text("% of samples right", "采样正确率 %")
        drawing = report.Lines(Text("update", "更新步"), y_label, reward, _width(reward), percent=True)
        plots.append(report.Plot(Text("Reward during RL", "强化学习中的奖励"), drawing))
    length = _curves(summary, run_folder, "rl", "length")
    if length:
        drawing = report.Lines(Text("update", "更新步"), Text("tokens", "词元"), length, _width(length))
        plots.append(report.Plot(Text("Length of what it writes during RL", "强化学习中的书写长度"), drawing))
    level = _curves(summary, run_folder, "rl", "level")
    if level:
        drawing = report.Lines(Text("update", "更新步"), Text("mean level", "平均难度"), level, _width(level))
        plots.append(report.Plot(Text("Difficulty of the problems that RL draws", "强化学习所抽题目的难度"), drawing))
    return plots


def _claim(summary: Summary) -> Words:
    """Say in one paragraph what was compared, and whether the comparison was won."""
    problems = summary.get("problems")
    amount = (f"{problems:,} ", f" {problems:,} 道") if problems else ("", "")
    en = (
        f"Accuracy on {amount[0]}held-out problems that no stage has seen. Both controls start from the same SFT"
        " checkpoint and are to get no less CPU time than RL, rollouts included; their learning rate and checkpoint are"
        " chosen on a validation set, as for RL. Intervals are 95%, bootstrapped over problems and seeds."
    )
    zh = (
        f"在任何阶段都未见过的{amount[1]}留出题上的正确率。两个对照组从同一监督微调检查点出发，"
        "应得 CPU 时间不少于强化学习（含采样），学习率与检查点同样在验证集上挑选。"
        "区间为 95%，对题目与随机种子自助抽样得到。"
    )
    known = [found for found in (measured(summary, "accuracy", "difference", name) for name in CLAIMED) if found]
    by_seed = [value for name in CLAIMED for value in summary.get("difference_by_seed", {}).get(name, [])]
    if not known:
        return Text(en, zh)
    spent = {stage: number(summary, "compute", stage, "cpu_seconds") for stage in ("rl", *CONTROLS)}
    less = [stage for stage in CONTROLS if spent["rl"] and (spent[stage] or spent["rl"]) < spent["rl"]]
    if less:
        return Text(
            en + " Here, however, a control got less CPU time than RL, so this run shows nothing: repeat it when the"
            " machine is quieter.",
            zh + "但此次有对照组所得 CPU 时间少于强化学习，因此不足为凭：请在更空闲的机器上重跑。",
        )
    if all(difference.low > 0 for difference in known) and all(value > 0 for value in by_seed):
        return Text(en + " RL is ahead of both controls.", zh + "强化学习胜过两个对照组。")
    return Text(
        en + " An interval of the difference reaches zero, or a seed is against it: this run does not show that RL is"
        " ahead.",
        zh + "差值的区间触及零，或有随机种子与之相反：这次运行不足以说明强化学习更好。",
    )


def _accuracy_table(summary: Summary, stages: list[str]) -> report.Table:
    rows: list[list[Cell]] = []
    for stage in stages:
        values = [measured(summary, "accuracy", stage, measure) for measure in MEASURES]
        rows.append([STAGES[stage], *(percent(value) for value in values)])
    values = [measured(summary, "accuracy", "difference", measure) for measure in MEASURES]
    if any(values):
        name = Text("difference: RL minus the better control", "差值：强化学习减较好对照组")
        rows.append([name, *(percent(value, "+.1f") for value in values)])
    return report.Table([Text("% right", "正确率 %"), *MEASURES.values()], rows)


def _accuracy_plot(summary: Summary, stages: list[str]) -> report.Plot:
    values = [[measured(summary, "accuracy", stage, measure) for stage in stages] for measure in MEASURES]
    drawing = report.Intervals(
        Text("% right", "正确率 %"), [STAGES[stage] for stage in stages], list(MEASURES.values()), values
    )
    return report.Plot(Text("Accuracy by stage", "各阶段正确率"), drawing)


def _difference_plot(summary: Summary) -> report.Plot:
    measures = [name for name in MEASURES if measured(summary, "accuracy", "difference", name)]
    row = [measured(summary, "accuracy", "difference", measure) for measure in measures]
    seeds = summary.get("difference_by_seed", {}).get("greedy", [])
    listed = ", ".join(f"{100 * value:+.1f}" for value in seeds)
    note = Text(f"Greedy, seed by seed: {listed}", f"贪心，按种子：{listed}") if seeds else ""
    names = [MEASURES[measure] for measure in measures]
    drawing = report.Intervals(Text("points", "百分点"), names, [""], [row], zero=True)
    return report.Plot(Text("RL minus the better control", "强化学习减较好对照组"), drawing, note, wide=True)


def _level_plot(by_level: Mapping[str, Mapping[str, Any]]) -> report.Plot:
    lines = []
    for stage in [stage for stage in STAGES if stage in by_level]:
        rows = sorted((float(level), value) for level, value in by_level[stage].items())
        lines.append(_band(stage, [level for level, _ in rows], [value for _, value in rows]))
    drawing = report.Lines(Text("level of difficulty", "难度"), Text("% right", "正确率 %"), lines, percent=True)
    return report.Plot(Text("Accuracy by level", "各难度正确率"), drawing)


def _length_plot(by_length: Mapping[str, list[Mapping[str, Any]]]) -> report.Plot:
    lines = []
    for stage in [stage for stage in STAGES if stage in by_length]:
        rows = sorted(by_length[stage], key=lambda row: row["tokens"])
        lines.append(_band(stage, [row["tokens"] for row in rows], rows))
    x_label = Text("tokens of thought", "思考的词元数")
    drawing = report.Lines(x_label, Text("% right", "正确率 %"), lines, percent=True)
    return report.Plot(Text("Accuracy against length of thought", "正确率与思考长度"), drawing)


def _band(stage: str, x: list[float], values: list[Any]) -> report.Line:
    known = [(place, value) for place, value in zip(x, map(as_interval, values), strict=True) if value]
    return report.Line(
        STAGES[stage],
        [place for place, _ in known],
        [value.mean for _, value in known],
        [value.low for _, value in known],
        [value.high for _, value in known],
        COLOURS[stage],
    )


def _compute_table(compute: Mapping[str, Mapping[str, float]]) -> report.Table:
    header: list[Words] = [
        Text("spent, rollouts included", "所用算力（含采样）"),
        Text("CPU seconds", "CPU 秒"),
        "GFLOP",
    ]
    rows: list[list[Words]] = []
    for stage, spent in compute.items():
        seconds, flops = spent.get("cpu_seconds"), spent.get("flops")
        rows.append([STAGES.get(stage, stage), grouped(seconds), grouped(flops / 1e9 if flops else None)])
    return report.Table(header, rows)


def _samples(summary: Summary) -> report.Section:
    names = ("question", "answer", "before", "after", "before_right", "after_right")
    samples = [report.Sample(*(sample.get(name) for name in names)) for sample in summary.get("samples", [])]
    shown = report.Samples(samples, before=STAGES["sft"], after=STAGES["rl"])
    return report.Section(Text("What it writes", "它写了什么"), [shown] if samples else [])


def _language(summary: Summary, run_folder: Path) -> report.Section:
    parts: list[Part] = []
    ratios = summary.get("bits_per_byte", {})
    names: dict[str, Words] = {"model": Text("this model", "本模型"), "xz": "xz -9", "gzip": "gzip -9"}
    bars = [
        report.Bar(name, ratios[key], f"{ratios[key]:.3f}", strong=key == "model")
        for key, name in names.items()
        if number(ratios, key) is not None
    ]
    if bars:
        drawing_bars = report.Bars(Text("bits per byte, fewer is better", "每字节比特数，越少越好"), bars)
        note = Text(
            "Unseen files, held out by content. gzip and xz compress them as one stream; the model's own size is not"
            " counted.",
            "按内容留出、训练未见的文件。gzip 与 xz 将其作为一个流压缩；模型自身大小未计入。",
        )
        parts.append(report.Plot(Text("How well it predicts unseen text", "对未见文本的预测"), drawing_bars, note))
    if summary.get("tokens_per_second"):
        parts.append(_speed_plot(summary))
    curves = _curves(summary, run_folder, "pretrain", "loss", Text("training", "训练"))
    curves += _curves(summary, run_folder, "pretrain", "held_out_loss", Text("held out", "留出"))
    if curves:
        drawing = report.Lines(
            Text("step", "步"), Text("loss, nats per token", "损失，奈特/词元"), curves, _width(curves)
        )
        parts.append(report.Plot(Text("Pretraining loss", "预训练损失"), drawing))
    sft = _curves(summary, run_folder, "sft", "loss")
    if sft:
        drawing = report.Lines(Text("step", "步"), Text("loss, nats per token", "损失，奈特/词元"), sft, _width(sft))
        parts.append(report.Plot(Text("Fine-tuning loss", "微调损失"), drawing))
    return report.Section(Text("Language and speed", "语言与速度"), parts)


def _speed_plot(summary: Summary) -> report.Plot:
    speeds = summary["tokens_per_second"]
    names = {
        "pretrain": Text("pretraining, all threads", "预训练（全部线程）"),
        "sft": Text("fine-tuning, one thread", "微调（单线程）"),
        "rollout": Text("RL rollouts, one thread", "强化学习采样（单线程）"),
    }
    bars = [
        report.Bar(name, speeds[key], f"{speeds[key]:,.0f}", strong=True)
        for key, name in names.items()
        if number(speeds, key) is not None
    ]
    share, note = number(summary, "mfu"), Text("", "")
    if share is not None:
        note = Text(
            f"Pretraining uses {100 * share:.1f}% of the matrix-product rate measured on this machine.",
            f"预训练用到本机实测矩阵乘速率的 {100 * share:.1f}%。",
        )
    drawing = report.Bars(Text("tokens per second", "每秒词元数"), bars)
    return report.Plot(Text("Tokens per second", "每秒词元数"), drawing, note)


def _provenance(summary: Summary, run_folder: Path) -> report.Section:
    parts: list[Part] = []
    for key, names in (("model", MODEL), ("corpus", CORPUS)):
        held = summary.get(key, {})
        rows: list[list[Words]] = [[words, cell(held[name])] for name, words in names.items() if name in held]
        if rows:
            parts.append(report.Table([TITLES[key], ""], rows, left=True))
    if summary.get("timings"):
        parts.append(_timing_plot(summary["timings"]))
    facts: list[list[Words]] = [[name, str(value)] for name, value in summary.get("machine", {}).items()]
    if number(summary, "peak_memory"):
        facts.append([Text("peak memory", "内存峰值"), f"{summary['peak_memory'] / 2**30:.2f} GiB"])
    if facts:
        parts.append(report.Table([Text("machine", "机器"), ""], facts, left=True))
    versions: list[list[Words]] = [[name, str(value)] for name, value in summary.get("versions", {}).items()]
    if versions:
        parts.append(report.Table([Text("versions", "版本"), ""], versions, left=True))
    config = run_folder / "config.toml"
    if config.exists():
        parts.append(report.Code(Text("The resolved config.toml", "解析后的 config.toml"), config.read_text("utf-8")))
    return report.Section(Text("How it was made", "如何得到"), parts)


def _timing_plot(timings: list[Mapping[str, Any]]) -> report.Plot:
    bars = [
        report.Bar(STEPS.get(row["step"], row["step"]), row["seconds"], duration(row["seconds"])) for row in timings
    ]
    return report.Plot(Text("Where the time went", "时间花在哪里"), report.Bars(Text("seconds", "秒"), bars), wide=True)


def _curves(summary: Summary, run_folder: Path, stage: str, key: str, name: Words = "") -> list[report.Line]:
    """Return the curve of `key` in the metrics of a stage, one for each seed."""
    paths = summary.get("metrics", {}).get(stage, [])
    paths = [paths] if isinstance(paths, str) else paths
    lines = []
    for seed, path in enumerate(paths):
        rows = [row for row in read_metrics(run_folder / path) if isinstance(row.get(key), int | float)]
        label = name or (Text(f"seed {seed}", f"种子 {seed}") if len(paths) > 1 else "")
        if rows:
            lines.append(report.Line(label, [row["step"] for row in rows], [row[key] for row in rows]))
    return lines


def _width(curves: list[report.Line]) -> int:
    """Return a smoothing width: about a fortieth of the longest curve."""
    return max(1, max(len(curve.x) for curve in curves) // 40)

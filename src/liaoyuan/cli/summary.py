"""`summary.json` of a quickstart run: its keys, their names in both languages, and how the report reads them.

The report shows what is there; every key may be missing. `{m}` stands for `{"mean", "low", "high"}` (a 95% interval):

    bits_per_byte.{model,gzip,xz}                 numbers
    accuracy.STAGE.{greedy,sampled,pass_at_8}     {m}; STAGE is sft, rl, control, control_own_samples, fast, scratch
    accuracy.difference.{greedy,sampled,pass_at_8}  {m}, RL minus the better control, paired by problem
    seeds, seconds, mfu, peak_memory              number of seeds, wall seconds, share 0..1, bytes
    problems                                      number of held-out problems
    tokens_per_second.{pretrain,sft,rollout}      numbers
    model.{parameters,num_hidden_layers,hidden_size,vocab_size,dtype}
    corpus.{source,documents,bytes,tokens,vocab_size,duplicates,skipped}   as in the corpus's manifest.json
    metrics.{pretrain,sft,rl}                     a path, or a list of paths (one per seed), inside the run folder; rows
                                                  have `loss`, may have `held_out_loss`; of RL `reward`, `length`
    accuracy_by_level.STAGE.LEVEL                 {m}
    accuracy_by_length.STAGE                      list of {m} with "tokens", the mean length of thought of the group
    difference_by_seed.{greedy,sampled,pass_at_8}  list of numbers
    compute.STAGE.{cpu_seconds,flops}             what was spent on a stage, rollouts included
    samples                                       list of {question, answer, before, after, before_right, after_right}
    timings                                       list of {step, seconds}
    machine, versions                             name -> text
"""

import math
from collections.abc import Mapping
from typing import Any

from liaoyuan.report import Cell, Interval, Noted, Text, Words

Summary = Mapping[str, Any]
STAGES: dict[str, Text] = {
    "scratch": Text("the same from random weights", "同样步骤，从随机权重"),
    "sft": Text("after SFT", "监督微调后"),
    "control": Text("control: more SFT", "对照：继续微调"),
    "control_own_samples": Text("control: own samples", "对照：自采样微调"),
    "rl": Text("after RL", "强化学习后"),
    "fast": Text("RL, no thinking", "强化学习后，不思考"),
}
COLOURS = {"rl": 0, "sft": 1, "control": 2, "control_own_samples": 3, "fast": 4, "scratch": 5}
MEASURES: dict[str, Text] = {
    "greedy": Text("greedy", "贪心"),
    "sampled": Text("sampled", "采样"),
    "pass_at_8": Text("pass@8", "pass@8"),
}
CLAIMED = ("greedy", "sampled")  # the differences on which a gain is claimed; pass@8 is shown beside them
STEPS: dict[str, Text] = {
    "data": Text("data and tokenizer", "数据与分词器"),
    "pretrain": Text("pretraining", "预训练"),
    "sft": Text("supervised fine-tuning", "监督微调"),
    "rl": Text("reinforcement learning", "强化学习"),
    "control": Text("control: more SFT", "对照：继续微调"),
    "control_own_samples": Text("control: own samples", "对照：自采样微调"),
    "scratch": Text("the same from random weights", "同样步骤，从随机权重开始"),
    "study": Text("teaching and measuring", "教学与测量"),
    "measure": Text("measuring", "测量"),
    "report": Text("report", "报告"),
}
CORPUS: dict[str, Text] = {
    "source": Text("source", "来源"),
    "documents": Text("documents", "文档数"),
    "bytes": Text("bytes", "字节"),
    "tokens": Text("tokens", "词元"),
    "vocab_size": Text("vocabulary", "词表大小"),
    "duplicates": Text("exact duplicates dropped", "去除的完全重复"),
    "skipped": Text("files skipped", "跳过的文件"),
}
TITLES = {"model": Text("model", "模型"), "corpus": Text("corpus", "语料")}
MODEL: dict[str, Text] = {
    "parameters": Text("parameters", "参数量"),
    "num_hidden_layers": Text("layers", "层数"),
    "hidden_size": Text("hidden size", "隐藏维度"),
    "vocab_size": Text("vocabulary", "词表大小"),
    "dtype": Text("number type", "数值类型"),
}


def measured(summary: Summary, *keys: str) -> Interval | None:
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return as_interval(value)


def as_interval(value: Any) -> Interval | None:
    """Return `{mean, low, high}` as an interval; a bare number is one without width; what is not finite is None."""
    if isinstance(value, Mapping):
        mean = value.get("mean")
        numbers = (mean, value.get("low", mean), value.get("high", mean))
    else:
        numbers = (value, value, value)
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        return None
    return Interval(*map(float, numbers))


def number(summary: Summary, *keys: str) -> float | None:
    found = measured(summary, *keys)
    return found.mean if found else None


def interval(value: Interval, factor: float, unit: str = "") -> Words:
    low, high = factor * value.low, factor * value.high
    return Text(f"95% interval {low:.1f} to {high:.1f}{unit}", f"95% 区间 {low:.1f} 至 {high:.1f}{unit}")


def percent(value: Interval | None, form: str = ".1f") -> Cell:
    """Return a share as percent with its interval under it."""
    if value is None:
        return "–"
    low, high = f"{100 * value.low:{form}}", f"{100 * value.high:{form}}"
    return Noted(f"{100 * value.mean:{form}}", Text(f"{low} to {high}", f"{low} 至 {high}"))


def duration(seconds: float, exact: bool = True) -> str:
    """Return "12 min 43 s"; "13 min" if it need not be exact."""
    if not math.isfinite(seconds):
        return "–"
    seconds = seconds if exact or seconds < 60 else 60 * round(seconds / 60)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s" if exact else f"{minutes} min"
    return f"{rest} s"


def grouped(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def cell(value: Any) -> str:
    """Return a fact as text; of a mapping with a name its name, of another its entries."""
    if isinstance(value, Mapping):
        return (
            str(value["name"])
            if "name" in value
            else ", ".join(f"{k.replace('_', ' ')} {cell(v)}" for k, v in value.items())
        )
    return f"{value:,}" if isinstance(value, int) else str(value)

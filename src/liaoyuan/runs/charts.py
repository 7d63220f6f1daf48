"""What the figures in `metrics.jsonl` are called in both languages, and which of them belong in one plot."""

from dataclasses import dataclass

from liaoyuan.report import Text, Words


@dataclass(frozen=True)
class Chart:
    """One plot: the columns that it draws and what each is called; percent: they are shares."""

    title: Text
    unit: Text
    figures: dict[str, Words]
    percent: bool = False
    log_y: bool = False


TOKENS = Text("tokens", "词元")
NATS = Text("nats per token", "奈特/词元")
SHARE = Text("share", "比例")
CHARTS = (
    Chart(
        Text("Reward", "奖励"),
        Text("mean of the rollouts", "采样均值"),
        {"reward": Text("reward", "奖励")},
    ),
    Chart(
        Text("Validation", "验证"),
        Text("% right", "正确率 %"),
        {"validation_greedy": Text("greedy", "贪心"), "validation_sampled": Text("sampled", "采样")},
        percent=True,
    ),
    Chart(
        Text("Loss", "损失"),
        NATS,
        {
            "loss": Text("training", "训练"),
            "validation_loss": Text("validation", "验证"),
            "held_out_loss": Text("held out", "留出"),
            "general_loss": Text("general text", "通用文本"),
        },
    ),
    Chart(
        Text("Tokens foretold in validation", "验证集词元预测"),
        Text("% right", "正确率 %"),
        {"validation_accuracy": Text("tokens foretold", "词元预测")},
        percent=True,
    ),
    Chart(
        Text("Better answers that are preferred", "较优回答被偏好的比例"),
        Text("% of pairs", "占样本对 %"),
        {"accuracy": Text("training", "训练"), "held_out_accuracy": Text("held out", "留出")},
        percent=True,
    ),
    Chart(
        Text("Margin between better and worse answers", "较优与较劣回答之差"),
        Text("rewards", "奖励"),
        {"margin": Text("training", "训练"), "held_out_margin": Text("held out", "留出")},
    ),
    Chart(
        Text("Log-probability of answers", "回答的对数概率"),
        Text("nats per answer", "奈特/回答"),
        {"chosen_log_prob": Text("better", "较优"), "rejected_log_prob": Text("worse", "较劣")},
    ),
    Chart(
        Text("Groups without signal", "没有信号的组"),
        Text("% of groups", "占组数 %"),
        {
            "all_right": Text("all right", "全对"),
            "all_wrong": Text("all wrong", "全错"),
            "no_signal": Text("all alike", "全同"),
        },
        percent=True,
    ),
    Chart(
        Text("Length of what it writes", "书写长度"),
        TOKENS,
        {
            "length": Text("all", "全部"),
            "length_right": Text("right answers", "正确答案"),
            "length_wrong": Text("wrong answers", "错误答案"),
            "thought_length": Text("thoughts", "思考"),
        },
    ),
    Chart(Text("Entropy", "熵"), NATS, {"entropy": Text("entropy", "熵")}),
    Chart(
        Text("Answers that are not whole, or not judged", "不完整或无法评判的答案"),
        Text("% of rollouts", "占采样 %"),
        {
            "truncated": Text("cut off", "被截断"),
            "unparsed": Text("no answer found", "未找到答案"),
            "unjudged": Text("not judged", "无法评判"),
        },
        percent=True,
    ),
    Chart(
        Text("Gap between rollout and training log-probabilities", "采样与训练对数概率之差"),
        Text("nats", "奈特"),
        {
            "log_prob_gap": Text("largest", "最大"),
            "gap_p99": Text("99th percentile", "99 分位"),
            "gap_mean": Text("mean", "均值"),
        },
    ),
    Chart(
        Text("Divergence of training from rollouts, first update", "首次更新时训练与采样的散度"),
        NATS,
        {"gap_kl": Text("KL", "KL 散度")},
    ),
    Chart(
        Text("Ratio of training to rollout probabilities, first update", "首次更新时训练与采样概率之比"),
        Text("1 is exact", "1 为精确"),
        {"ratio_max": Text("largest", "最大"), "ratio_min": Text("smallest", "最小")},
    ),
    Chart(
        Text("Tokens whose ratio is clipped", "比率被裁剪的词元"),
        Text("% of tokens", "占词元 %"),
        {
            "clipped": Text("all", "全部"),
            "clipped_high": Text("too much likelier", "过于提高"),
            "clipped_low": Text("too much less likely", "过于降低"),
        },
        percent=True,
    ),
    Chart(
        Text("Divergence from the start model", "与起始模型的散度"),
        NATS,
        {"kl_start": Text("policy", "策略"), "kl": Text("on its data", "在其数据上")},
    ),
    Chart(
        Text("Signs of answers without work", "不劳而获的迹象"),
        Text("% of rollouts", "占采样 %"),
        {
            "one_answer": Text("the usual wrong answer", "最常见的错误答案"),
            "copied": Text("copied from the prompt", "抄自题目"),
        },
        percent=True,
    ),
    Chart(
        Text("Level of the problems drawn", "所抽题目的难度"),
        Text("mean level", "平均难度"),
        {"level": Text("level", "难度")},
    ),
    Chart(Text("Gradient norm", "梯度范数"), Text("norm", "范数"), {"grad_norm": Text("gradient norm", "梯度范数")}),
    Chart(
        Text("Learning rate", "学习率"), Text("per step", "每步"), {"learning_rate": Text("learning rate", "学习率")}
    ),
    Chart(
        Text("Speed", "速度"),
        Text("tokens/s", "词元/秒"),
        {
            "tokens_per_second": Text("training", "训练"),
            "rollout_tokens_per_second": Text("rollouts", "采样"),
            "train_tokens_per_second": Text("updates", "更新"),
        },
    ),
)
WHOLE = frozenset({"loss", "length", "margin", "accuracy", "log_prob_gap", "kl_start", "clipped"})  # are their chart
# Columns that are drawn where nobody chose; all others can be chosen.
USUAL = WHOLE | frozenset(
    {"reward", "validation_greedy", "validation_sampled", "validation_loss", "held_out_loss", "validation_accuracy"}
    | {"held_out_accuracy", "held_out_margin", "all_right", "all_wrong", "no_signal", "length_right", "length_wrong"}
    | {"entropy", "truncated", "unparsed", "level", "grad_norm"}
)
# Columns that are kept for reckoning, not for looking at.
QUIET = frozenset(
    {"flops", "dropped", "penalty", "updates", "problems", "staleness", "seconds_left", "generated_tokens"}
)


def chart_of(figure: str) -> Chart | None:
    """Return the chart to which a column belongs."""
    return next((chart for chart in CHARTS if figure in chart.figures), None)


def title_of(figure: str) -> Words:
    """Return what a column is called where it stands alone; one that nobody named, by its own name."""
    chart = chart_of(figure)
    if chart is None:
        return figure
    if len(chart.figures) == 1 or figure in WHOLE:
        return chart.title
    (title, title_zh), (name, name_zh) = both(chart.title), both(chart.figures[figure])
    return Text(f"{title}: {name}", f"{title_zh}：{name_zh}")


def both(words: Words) -> tuple[str, str]:
    """Return the English and the Chinese text."""
    return (words, words) if isinstance(words, str) else (words.en, words.zh)

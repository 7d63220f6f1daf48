"""The quickstart's report says what the summary says, claims no more, and is written whatever is missing."""

import copy
import json
import math
import re
from pathlib import Path

import pytest

from liaoyuan.cli.quickstart_report import write_report
from liaoyuan.cli.summary import STAGES, duration
from liaoyuan.errors import LiaoyuanError


def interval(mean: float, width: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def measured(mean: float) -> dict[str, dict[str, float]]:
    return {name: interval(mean) for name in ("greedy", "sampled", "pass_at_8")}


SUMMARY = {
    "bits_per_byte": {"model": 2.214, "gzip": 2.356, "xz": 1.999},
    "accuracy": {
        **{stage: measured(0.3 + 0.05 * place) for place, stage in enumerate(STAGES)},
        "difference": {"greedy": interval(0.179), "sampled": interval(0.197)},
    },
    "seeds": 3,
    "seconds": 1834.2,
    "mfu": 0.142,
    "peak_memory": 2**31,
    "problems": 2000,
    "tokens_per_second": {"pretrain": 6120.0, "sft": 8800.0, "rollout": 3120.0},
    "model": {"parameters": 9_312_000, "num_hidden_layers": 6, "dtype": "bfloat16", "unknown": 1},
    "corpus": {
        "source": {"name": "Python <library>", "files": 734},
        "documents": {"train": 682, "held_out": 47},
        "duplicates": 2,
    },
    "metrics": {"pretrain": "pretrain.jsonl", "sft": "none.jsonl", "rl": ["rl0.jsonl", "rl1.jsonl"]},
    "accuracy_by_level": {"sft": {"1": interval(0.9), "10": interval(0.2), "2": interval(0.5)}},
    "accuracy_by_length": {"rl": [{"tokens": 40, **interval(0.8)}, {"tokens": 20, **interval(0.9)}]},
    "difference_by_seed": {"greedy": [0.171, 0.188, 0.178]},
    "compute": {"rl": {"cpu_seconds": 312.3, "flops": 2.1e13}, "control": {"cpu_seconds": 330.0}},
    "samples": [{"question": "2 + 3 = ?", "answer": "5", "before": "<6>", "after": "5", "after_right": True}],
    "timings": [{"step": "data", "seconds": 31.0}, {"step": "something new", "seconds": 3700.0}],
    "machine": {"cpu": "Some CPU"},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, key in (("pretrain", "loss"), ("rl0", "reward"), ("rl1", "reward")):
        rows = (json.dumps({"step": step, key: 1 / (step + 1)}) for step in range(50))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "config.toml").write_text("[data]\nvocab_size = 4096\n")
    return tmp_path


def page_of(run: Path, summary: dict) -> str:
    (run / "summary.json").write_text(json.dumps(summary))
    return write_report(run).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))


def test_every_figure_of_the_summary_is_shown(run):
    words = words_of(page_of(run, SUMMARY))
    for shown in (
        "+17.9", "+19.7", "2.214", "1.999", "2.356", "31 min", "6,120", "3,120", "14.2%", "9,312,000",
        "Python &lt;library&gt;", "train 682, held out 47", "2.00 GiB", "+17.1, +18.8, +17.8", "312", "21,000",
        "&lt;6&gt;", "1 h 01 min", "something new", "vocab_size = 4096", "Some CPU", "2,000",
    ):  # fmt: skip
        assert shown in words, shown
    for words_of_stage in STAGES.values():
        assert words_of_stage.en in words and words_of_stage.zh in words


def test_a_gain_is_claimed_only_where_its_interval_is_above_zero(run):
    beside = copy.deepcopy(SUMMARY)
    beside["accuracy"]["difference"]["pass_at_8"] = {"mean": -0.05, "low": -0.06, "high": -0.04}
    won = words_of(page_of(run, beside))
    assert "RL is ahead of both controls" in won and "does not show" not in won
    reaching_zero, one_seed_against = copy.deepcopy(SUMMARY), copy.deepcopy(SUMMARY)
    reaching_zero["accuracy"]["difference"]["sampled"] = {"mean": 0.01, "low": -0.004, "high": 0.03}
    one_seed_against["difference_by_seed"]["greedy"][1] = -0.01
    for summary in (reaching_zero, one_seed_against):
        lost = words_of(page_of(run, summary))
        assert "RL is ahead of both controls" not in lost and "does not show that RL is ahead" in lost


def test_nothing_is_claimed_where_a_control_got_less_time_than_rl(run):
    summary = copy.deepcopy(SUMMARY)
    summary["compute"]["control_own_samples"] = {"cpu_seconds": 300.0}
    words = words_of(page_of(run, summary))
    assert "a control got less CPU time than RL" in words and "RL is ahead of both controls" not in words


@pytest.mark.parametrize("gone", [sorted(SUMMARY)[::2], sorted(SUMMARY)[1::2], ["accuracy"]], ids=str)
def test_any_key_may_be_missing(run, gone):
    page = page_of(run, {name: value for name, value in SUMMARY.items() if name not in gone})
    assert page.endswith("</html>\n")


def test_an_empty_summary_still_gives_a_page(tmp_path):
    assert "</html>" in page_of(tmp_path, {})


def test_numbers_that_are_not_finite_are_not_shown_as_figures(run):
    summary = copy.deepcopy(SUMMARY)
    summary["bits_per_byte"]["model"] = summary["mfu"] = summary["seconds"] = math.nan
    summary["accuracy"]["rl"]["greedy"] = {"mean": math.nan, "low": math.nan, "high": math.nan}
    assert not re.search(r"\bnan\b", words_of(page_of(run, summary)))


def test_no_summary_is_one_sentence(tmp_path):
    with pytest.raises(LiaoyuanError, match=r"summary\.json does not exist"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_report(run):
    assert page_of(run, SUMMARY) == page_of(run, SUMMARY)


@pytest.mark.parametrize(
    ("seconds", "exact", "about"),
    [
        (12.4, "12 s", "12 s"),
        (763, "12 min 43 s", "13 min"),
        (3590, "59 min 50 s", "1 h 00 min"),
        (7265, "2 h 01 min", "2 h 01 min"),
    ],
)
def test_durations(seconds, exact, about):
    assert (duration(seconds), duration(seconds, exact=False)) == (exact, about)

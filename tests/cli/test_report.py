"""A run's page: what is on it, that hostile text is only text, and what it costs while the run goes on."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from liaoyuan.cli import live_report as live
from liaoyuan.cli.progress import SmallCurve
from liaoyuan.cli.report import names_of, report
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import Lock, Progress
from liaoyuan.runs import both, tables_of
from tests.runs.making import HOSTILE, make_run, rollout, row, write_metrics, write_rollouts


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "rl", 12, groups=2, total=20)
    figures = {"validation_greedy": 0.5, "log_prob_gap": 0.0, "of_my_own": 3.0, "all_right": 0.25, "length_wrong": 9}
    write_metrics(folder, [row(step, **figures) for step in range(12)])
    findings = {"step": 3, "name": "x", "severity": "warning", "what": "Most groups are all wrong.", "do": "Lower it."}
    (folder / "findings.jsonl").write_text(json.dumps(findings) + "\n")
    greedy = {"mean": 0.62, "low": 0.58, "high": 0.66}
    result = {"steps": 20, "accuracy": {"start": {"greedy": 0.41}, "tuned": {"greedy": greedy}}, "note": None}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_page_of_a_run_says_all_that_its_folder_holds(run, capsys):
    report([run])
    page = (run / "report.html").read_text(encoding="utf-8")
    words = words_of(page)
    for said in (
        "Reinforcement learning: rl", "强化学习：rl", "12 of 20 steps", "Most groups are all wrong.", "Lower it.",
        "! warning", "0.62", "0.58 to 0.66", "the model it began from", "Reward", "奖励", "Validation", "of_my_own",
        "Gap between rollout and training", "wrong answers", "carry 0 → 11", "11=?", "task = &quot;addition&quot;",
    ):  # fmt: skip
        assert said in words, said
    assert page.count("<svg") == 7 and "http-equiv" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page), "it needs nothing but itself"
    assert "The report is in" in capsys.readouterr().out


def test_runs_are_compared_on_one_page(run, tmp_path):
    make_run(tmp_path / "other" / "rl", 5)
    report([run, tmp_path / "other" / "rl"], tmp_path / "both.html")
    words = words_of((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "2 runs compared" in words and "other/rl" in words and "12/20" in words and "5/5" in words
    with pytest.raises(LiaoyuanError, match="--out"):
        report([run, tmp_path / "other" / "rl"])
    with pytest.raises(LiaoyuanError, match="is no run folder"):
        report([tmp_path / "none"])
    (run / "summary.json").write_text("{}")
    with pytest.raises(LiaoyuanError, match="keeps its own report"):
        report([run])
    assert names_of([Path("a/b"), Path("c/b"), Path("c/d")]) == ["a/b", "c/b", "c/d"]


def test_the_results_of_every_kind_of_run_are_tables():
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rl = {"steps": 9, "accuracy": {"start": {"greedy": interval}, "model": {"greedy": 0.75}}}
    sft = {"kept": {"step": 3, "choice": "the last"}, "held_out": {"records": 7, "loss": {"before": interval}}}
    dpo = {"held_out": 40, "start": {"margin": interval}, "model": {"margin": interval, "accuracy": 0.25}}
    shapes = []
    for result in (rl, sft, dpo):
        found = tables_of(result)
        rows = [[(both(name)[0], [each.value for each in row]) for name, row in table.rows] for table in found.tables]
        shapes.append((rows, {both(name)[0]: value for name, value in found.facts}))
    assert shapes == [
        ([[("the model it began from", ["0.5"]), ("the tuned model", ["0.75"])]], {"steps": "9"}),
        ([[("loss", ["0.5"])]], {"kept": "step 3, choice the last"}),
        ([[("the model it began from", ["0.5", "–"]), ("the tuned model", ["0.5", "0.25"])]], {"held out": "40"}),
    ]
    assert tables_of(dpo).tables[0].rows[0][1][0].interval == ("0.4", "0.6")


@pytest.mark.parametrize("gone", ["metrics.jsonl", "config.toml", "findings.jsonl", "result.json", "rollouts"])
def test_any_part_of_a_run_may_be_missing_or_broken(run, gone):
    path = run / gone
    if path.is_dir():
        for each in path.iterdir():
            each.write_bytes(b"torn")
    elif gone in ("metrics.jsonl", "config.toml"):
        path.unlink()
    else:
        path.write_bytes(b'{"torn": \xff')
    report([run])
    assert (run / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)


def test_what_a_hostile_model_wrote_is_text_on_the_page(run):
    hostile = {key: HOSTILE for key in rollout(0, 0, 0) if key not in ("step", "group", "sample", "reward")}
    write_rollouts(run, 12, [rollout(12, 0, 0, **hostile), rollout(12, 0, 1, text="z" * 1_000_000)])
    (run / "findings.jsonl").write_text(json.dumps({"step": 1, "severity": "error", "what": HOSTILE}) + "\n")
    (run / "result.json").write_text(json.dumps({HOSTILE: {HOSTILE: {HOSTILE: HOSTILE}}}))
    (run / "config.toml").write_text(f"name = '''{HOSTILE}'''", encoding="utf-8", errors="replace")
    write_metrics(run, [row(0, **{HOSTILE: 1.0})])
    report([run])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page and "\u202e" not in page and len(page) < 500_000
    tags = Tags()
    tags.feed(page)
    assert tags.seen.count("script") == 1 and "img" not in tags.seen and "textarea" not in tags.seen


def tune(folder: Path, until: int = 200) -> None:
    """Be a run that writes its metrics and reports its progress."""
    with live.live_report(folder, lambda progress: None) as told:
        for step in range(until):
            write_metrics(folder, [row(each) for each in range(step + 1)])
            told(Progress(step + 1, 200))


def test_the_pages_of_a_run_cost_at_most_a_hundredth_of_its_time(tmp_path, monkeypatch):
    now = {"cpu": 0.0, "wall": 0.0}
    pages: list[float] = []

    def write_page(folder: Path, state: str) -> None:
        pages.append(now["cpu"])
        now["cpu"] += 0.4

    monkeypatch.setattr(live, "write_page", write_page)
    monkeypatch.setattr(live.time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(live.time, "monotonic", lambda: now["wall"])
    page = live.LivePage(tmp_path)
    page.begun = True
    while now["cpu"] < 1000:
        now["cpu"] += 0.5
        now["wall"] += 0.5
        if page.is_due():
            page.write("running")
            assert page.spent <= 0.01 * now["cpu"]
    assert 20 <= len(pages) <= 25 and 150 <= pages[0] <= 160, "the first one is taken to cost more"
    page.write("ended")
    assert page.spent <= 0.01 * now["cpu"], "the page of the end was thought of"


def test_the_page_is_there_at_the_end_and_after_a_stop(tmp_path, monkeypatch):
    tune(tmp_path / "whole", 5)
    assert "5 steps, ended" in words_of((tmp_path / "whole" / "report.html").read_text(encoding="utf-8"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.cli.test_report.row", stop)
    with pytest.raises(KeyboardInterrupt), live.live_report(tmp_path / "whole", lambda progress: None) as told:
        told(Progress(5, 9))
        stop()
    assert "stopped before its end" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(live, "write_page", fail)
    tune(tmp_path, 3)
    assert "could not be written: no space" in capsys.readouterr().err


def test_nothing_is_written_by_a_run_that_never_began(tmp_path):
    with pytest.raises(LiaoyuanError), live.live_report(tmp_path, lambda progress: None):
        raise LiaoyuanError("The folder is in use.")
    assert list(tmp_path.iterdir()) == []


def test_the_page_leaves_the_run_its_lock(tmp_path):
    """A process loses its lock on a file if it opens and closes that file again."""
    lock = Lock(tmp_path)
    lock.take()
    tune(tmp_path, 2)
    code = (
        f"from liaoyuan.rundir import Lock; from pathlib import Path; Lock(Path({str(tmp_path)!r}), patience=0).take()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by process" in done.stderr
    lock.release()


def test_a_terminal_draws_a_small_curve_of_the_loss_or_reward():
    curve = SmallCurve(width=8)
    drawn = [curve.after(Progress(step + 1, 80, value=float(step))) for step in range(80)]
    assert drawn[0] == "" and drawn[-1] == "▁▂▃▄▅▆▇█"
    falling = SmallCurve(width=4)
    assert [falling.after(Progress(step, 4, value=1.0 / step)) for step in (1, 2, 3, 4)][-1][0] == "█"
    assert falling.after(Progress(4, 4, value=float("nan"))) == falling.after(Progress(4, 4))
    flat = SmallCurve(width=4)
    assert [flat.after(Progress(step, 4, value=2.0)) for step in (1, 2, 3)][-1] == "▁▁▁"

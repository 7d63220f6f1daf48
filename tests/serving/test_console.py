"""The console's endpoints: small answers from run folders that are written, removed or hostile while they are read."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from liaoyuan.errors import LiaoyuanError
from liaoyuan.runs import Folder
from liaoyuan.serving.console import build_console, open_console
from tests.runs.making import HOSTILE, make_run, rollout, row, write_metrics, write_rollouts
from tests.verbs import Verb

PATHS = ("run", "curves", "steps", "rollouts", "text", "search")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client of the console of `tmp_path / "runs"`, in which there is a run."""
    make_run(tmp_path / "runs" / "rl")
    yield TestClient(
        build_console(Folder(tmp_path / "runs")), base_url="http://127.0.0.1", raise_server_exceptions=False
    )


def ask(client: TestClient, path: str, **args: Any) -> Any:
    reply = client.get(f"/data/{path}", params=args)
    assert reply.status_code == 200, reply.text
    assert reply.content.isascii()
    return reply.json()


def runs_of(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr("liaoyuan.serving.console.reading.LIST_SECONDS", 0.0)
    monkeypatch.setattr("liaoyuan.serving.console.reading.LIST_SHARE", 0)
    return ask(client, "runs")["runs"]


def test_runs_are_listed_with_what_they_are_and_how_far(client, tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "deep" / "other", 3, total=10)
    (tmp_path / "runs" / "rl" / "findings.jsonl").write_text('{"step": 1, "name": "a", "severity": "error"}\n')
    found = {run["name"]: run for run in runs_of(client, monkeypatch)}
    assert set(found) == {"rl", "deep/other"}
    assert found["rl"]["findings"] == {"error": 1, "warning": 0, "note": 0}
    assert found["rl"]["last"][0] | {"value": 0} == {
        "name": "reward",
        "title": {"en": "Reward", "zh": "奖励"},
        "unit": {"en": "mean of the rollouts", "zh": "采样均值"},
        "percent": False,
        "usual": True,
        "value": 0,
    }
    other = found["deep/other"]
    assert (other["kind"], other["state"], other["done"], other["total"]) == ("rl", "stopped", 3, 10)


def test_curves_of_several_runs_over_what_they_were_asked_for(client, tmp_path):
    make_run(tmp_path / "runs" / "b", 5)
    found = ask(client, "curves", run=["rl", "b", "gone"], figure=["reward", "none"], axis="cpu_seconds")["curves"]
    assert set(found) == {"rl", "b"} and set(found["b"]) == {"reward"}
    assert found["b"]["reward"] == [[0.5, 1.0, 1.5, 2.0, 2.5], [row(step)["reward"] for step in range(5)]]
    assert ask(client, "curves", run="b", figure="reward", axis="tokens")["curves"] == {"b": {}}
    assert ask(client, "run", run="b")["axes"] == ["step", "cpu_seconds"]
    assert [each["name"] for each in ask(client, "run", run="b")["figures"]] == ["reward", "entropy"]


def test_a_run_that_grows_is_followed_and_a_torn_line_waits(client, tmp_path, monkeypatch):
    line = json.dumps(row(30)) + "\n"
    with (tmp_path / "runs" / "rl" / "metrics.jsonl").open("a") as file:
        for part, done in ((line[:15], 30), (line[15:], 31)):
            file.write(part)
            file.flush()
            assert runs_of(client, monkeypatch)[0]["done"] == done
            assert len(ask(client, "curves", run="rl", figure="reward")["curves"]["rl"]["reward"][0]) == done


def test_a_run_that_is_removed_while_it_is_shown_is_said_to_be_gone(client, tmp_path, monkeypatch):
    assert runs_of(client, monkeypatch) and ask(client, "rollouts", run="rl", step=3)["all"] == 16
    shutil.rmtree(tmp_path / "runs" / "rl" / "rollouts")
    assert ask(client, "steps", run="rl") == {"steps": []}
    assert client.get("/data/rollouts", params={"run": "rl", "step": 4}).status_code == 404
    shutil.rmtree(tmp_path / "runs" / "rl")
    assert runs_of(client, monkeypatch) == []
    for path in PATHS:
        reply = client.get(f"/data/{path}", params={"run": "rl", "step": 3, "figure": "x", "place": 0, "name": "text"})
        if path == "curves":
            assert reply.json()["curves"] == {}
        else:
            assert reply.status_code == 404 and "no run rl" in reply.json()["error"]["message"]
    shutil.rmtree(tmp_path / "runs")
    assert client.get("/data/runs").status_code == 404


def test_rollouts_come_a_few_groups_at_a_time(client):
    first = ask(client, "rollouts", run="rl", step=3, limit=2)
    assert (first["all"], first["matching"], first["rollouts"], first["offset"]) == (16, 4, 16, 0)
    assert [group["group"] for group in first["groups"]] == [0, 1]
    assert first["verdicts"] == {"right": 8, "partly": 0, "wrong": 8, "unjudged": 0} and first["levels"] == [2, 3]
    group = first["groups"][1]
    assert (group["question"], group["gold"], group["task"], group["level"]) == ("1+3=?", "4", "addition", 3)
    sample = group["samples"][1]
    assert sample == {
        "sample": 1, "thought": "carry 1", "text": "5", "flaw": "", "reward": 0.0, "parsed": "5", "reason": "not 4",
        "tokens": 7, "advantage": -1.0, "verdict": "wrong", "place": 5, "wanted": True, "long": {},
    }  # fmt: skip
    assert [each["group"] for each in ask(client, "rollouts", run="rl", step=3, limit=2, offset=2)["groups"]] == [2, 3]
    assert ask(client, "rollouts", run="rl", step=3, limit=2, group=3)["offset"] == 2, "a link leads to its group"
    wrong = ask(client, "rollouts", run="rl", step=3, verdict="wrong", level=3)
    assert wrong["matching"] == 2 and wrong["rollouts"] == 4
    assert [each["wanted"] for each in wrong["groups"][0]["samples"]] == [False, True, False, True]
    assert ask(client, "rollouts", run="rl", step=3, words="2+3=")["matching"] == 1


def test_a_long_text_comes_in_pieces(client, tmp_path):
    text = "начало " + "x" * 1_000_000 + " end"
    write_rollouts(tmp_path / "runs" / "rl", 99, [rollout(99, 0, 0, text=text)])
    reply = client.get("/data/rollouts", params={"run": "rl", "step": 99})
    assert len(reply.content) < 20_000
    sample = reply.json()["groups"][0]["samples"][0]
    got, length = sample["text"], sample["long"]["text"]
    while len(got) < length:
        piece = ask(client, "text", run="rl", step=99, place=sample["place"], name="text", offset=len(got))
        assert len(piece["text"]) <= 50_000
        got += piece["text"]
    assert got == text
    for wrong in ({"name": "step"}, {"name": "__class__"}, {"place": 7}):
        args = {"run": "rl", "step": 99, "place": 0, "name": "text"} | wrong
        assert client.get("/data/text", params=args).status_code == 404


def test_a_search_goes_over_all_steps_a_stretch_at_a_time(client, monkeypatch):
    found = ask(client, "search", run="rl", words="3+7=")
    assert found["next"] is None
    assert [(hit["step"], hit["group"], hit["excerpt"]) for hit in found["hits"]] == [(7, 3, "3+7=?")]
    monkeypatch.setattr("liaoyuan.serving.console.reading.MOST_HITS", 5)
    steps, begin = [], 0
    while begin is not None:
        found = ask(client, "search", run="rl", words="carry", verdict="wrong", begin=begin)
        steps += [hit["step"] for hit in found["hits"]]
        begin = found["next"]
    assert steps == [step for step in range(30) for _ in range(8)]


def test_what_a_hostile_model_wrote_is_text_of_plain_characters(client, tmp_path):
    hostile = {key: HOSTILE for key in rollout(0, 0, 0) if key not in ("step", "group", "sample", "reward")}
    write_rollouts(tmp_path / "runs" / "rl", 50, [rollout(50, 0, 0, **hostile)] * 3)
    (tmp_path / "runs" / "rl" / "config.toml").write_text('name = "\x1b[31m"\n')
    (tmp_path / "runs" / "rl" / "result.json").write_text('{"<b>\\u202e": NaN, "deep": ' + "[" * 500 + "]" * 500 + "}")
    shown = json.dumps(ask(client, "rollouts", run="rl", step=50), ensure_ascii=False)
    shown += json.dumps(ask(client, "search", run="rl", words="<script>"), ensure_ascii=False)
    details = ask(client, "run", run="rl")
    shown += json.dumps(details, ensure_ascii=False)
    assert "\x1b" not in shown and "\u202e" not in shown and "\ud800" not in shown
    assert details["result"]["facts"] == [{"name": {"en": "<b>⟨U+202E⟩", "zh": "<b>⟨U+202E⟩"}, "value": "nan"}]


@pytest.mark.parametrize(
    "name", ["..", "../secret", "rl/../../secret", "link", "/etc", "%2e%2e", "rl\0", "", "x" * 900]
)
def test_nothing_outside_the_folder_can_be_read(client, tmp_path, name):
    make_run(tmp_path / "secret", 3)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    for path in PATHS:
        args = {"run": name, "step": 1, "figure": "reward", "place": 0, "name": "text"}
        reply = client.get(f"/data/{path}", params=args)
        assert reply.status_code in (400, 404) or reply.json() == {"axis": "step", "curves": {}}
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/chat/..%2fapp.py", "/data/../secret"):
        assert client.get(path).status_code == 404


def test_a_question_that_makes_no_sense_is_refused_in_a_sentence(client):
    for path, args in (
        ("curves", {"run": "rl", "figure": "reward", "axis": "moon"}),
        ("curves", {"run": "rl"}),
        ("curves", {"run": ["rl"] * 30, "figure": "reward"}),
        ("rollouts", {"run": "rl", "step": "x"}),
        ("rollouts", {"run": "rl", "step": -1}),
        ("rollouts", {"run": "rl", "step": 1, "limit": 10_000}),
        ("rollouts", {"run": "rl", "step": 1, "words": "x" * 2000}),
    ):
        reply = client.get(f"/data/{path}", params=args)
        assert reply.status_code == 400 and reply.json()["error"]["message"].endswith(".")


def test_only_this_machine_is_answered_and_every_reply_is_guarded(client, tmp_path):
    assert client.get("/data/runs", headers={"Host": "evil.example"}).status_code == 403
    for path in ("/", "/page/main.js", "/chat/base.css", "/data/runs", "/nothing"):
        reply = client.get(path)
        assert "default-src 'none'" in reply.headers["content-security-policy"], path
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert client.post("/data/runs").status_code == 405
    with pytest.raises(LiaoyuanError, match="There is no"):
        open_console(tmp_path / "none", 0)
    server = open_console(tmp_path / "runs", 0)
    try:
        assert server.url.startswith("http://127.0.0.1:")
    finally:
        server.close()


def test_a_thousand_steps_and_ten_thousand_rollouts_are_read_a_part_at_a_time(client, tmp_path, monkeypatch):
    """Answers stay small, and what was read is not read again."""
    run = tmp_path / "runs" / "long"
    write_metrics(run, [row(step, **{f"figure_{place}": step / 7 for place in range(25)}) for step in range(5000)])
    for step in range(0, 1000, 50):
        write_rollouts(run, step, [rollout(step, place // 8, place % 8) for place in range(512)])
    figures = [f"figure_{place}" for place in range(12)]
    reply = client.get("/data/curves", params={"run": "long", "figure": figures})
    assert all(len(each[0]) <= 1202 for each in reply.json()["curves"]["long"].values())
    assert len(client.get("/data/rollouts", params={"run": "long", "step": 500}).content) < 40_000
    monkeypatch.setattr("liaoyuan.runs.curves.json.loads", lambda line: pytest.fail("a row is read twice"))
    again = client.get("/data/curves", params={"run": "long", "figure": figures})
    assert again.content == reply.content


def test_the_command_line_opens_it_and_ctrl_c_is_a_clean_end(tmp_path):
    make_run(tmp_path / "runs" / "rl", 3)
    with Verb("console", tmp_path / "runs", "--port", "0", "--json") as process:
        assert process.stdout
        url = json.loads(process.stdout.readline())["url"]
        assert httpx.get(f"{url}/data/runs").json()["runs"][0]["name"] == "rl"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    refused = Verb("console", tmp_path / "none", "--port", "0", "--json")
    _, said = refused.communicate()
    assert refused.returncode == 2 and "There is no folder" in said and "Traceback" not in said

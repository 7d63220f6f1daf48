"""`liaoyuan eval` measures any task, and `liaoyuan rewards test` any reward; mistakes are one sentence."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from liaoyuan.checkpoint import save_model
from liaoyuan.cli.eval import evaluate
from liaoyuan.cli.rewards import app as rewards
from liaoyuan.data import Tokenizer, train_tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder, ModelConfig, initialise

app = typer.Typer()
app.command("eval")(evaluate)
app.add_typer(rewards, name="rewards")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["12+34=?\n"], 271).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = ModelConfig(
        "qwen3", tokenizer.vocab_size, 16, 32, 1, 2, 1, 8, max_position_embeddings=128, qk_norm=True, eos_token_id=0
    )
    save_model(initialise(Decoder(config), 0).eval(), folder / "model", folder / "tokenizer")
    return folder / "model"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"{number}+1=?", "answer": number + 1, "level": number % 2 + 1} for number in range(100)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.toml").write_text('[[parts]]\ndata = "sums.jsonl"\n[[parts]]\ntask = "modular"\nlevels = [2]\n')
    return tmp_path / "sums.toml"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_task_file_is_measured_and_every_answer_kept(model: Path, task: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    run = ["eval", "--model", str(model), "--task", str(task), "--problems", "8", "--samples", "2", "--max-tokens", "6"]
    found = json.loads(invoke(*run, "--pass-at", "1,2", "--answers", str(kept), "--json"))
    problems = found["problems"]
    assert 6 <= problems <= 8 and found["answers"] == 3 * problems  # modular has few different ones of level 2
    assert set(found["accuracy"]) == {"greedy", "sampled", "pass_at_1", "pass_at_2"}
    assert {line["name"] for line in found["breakdown"]} == {"sums", "modular", "level 1", "level 2"}
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 3 * problems and sum(row["sample"] == "greedy" for row in rows) == problems
    assert {"problem", "question", "gold", "thought", "text", "reward", "reason", "tokens", "parsed"} <= set(rows[0])
    assert all(row["tokens"] <= 6 for row in rows)
    shown = invoke(*run)
    assert "level 2" in shown and f"Of {3 * problems} answers" in shown


def test_a_thinking_budget_closes_every_thought(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "answers.jsonl"
    run = ["eval", "--model", str(model), "--problems", "6", "--samples", "2", "--max-tokens", "12"]
    invoke(*run, "--thinking-budget", "3", "--answers", str(kept))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 18 and all(row["thought_tokens"] <= 3 < row["tokens"] for row in rows)


def test_several_budgets_are_a_curve_with_the_fast_and_the_free_answers_beside_it(model: Path, tmp_path: Path) -> None:
    kept, drawn = tmp_path / "answers.jsonl", tmp_path / "budgets.svg"
    run = ["eval", "--model", str(model), "--problems", "6", "--samples", "2", "--max-tokens", "12"]
    curve = [*run, "--thinking-budget", "3, 0,6", "--answers", str(kept), "--plot", str(drawn)]
    ways = json.loads(invoke(*curve, "--json"))["ways"]
    assert list(ways) == ["fast", "0", "3", "6", "any"]
    alone = json.loads(invoke(*run, "--thinking-budget", "6", "--json"))
    assert ways["6"] == {name: alone[name] for name in ways["6"]}
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 5 * 18 and all(row["thought_tokens"] <= int(row["way"]) for row in rows if row["way"].isdigit())
    fast, none = ([row["text"] for row in rows if row["way"] == way] for way in ("fast", "0"))
    pairs = [*zip(fast, none, strict=True)]  # the mark that closes the thought takes one of the tokens
    assert any(none) and all(one.startswith(other.rstrip("\N{REPLACEMENT CHARACTER}")) for one, other in pairs)
    picture = drawn.read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "accuracy by thinking budget" in picture
    shown = invoke(*curve).splitlines()
    assert [line.split()[0] for line in shown[-6:-1]] == list(ways) and shown[-1].startswith("Of 90 answers")


def test_a_curve_that_cannot_be_drawn_takes_no_figure_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unjudged(*_: object) -> None:
        raise LiaoyuanError("of some budget no answer could be judged")

    monkeypatch.setattr("liaoyuan.cli.eval_budgets.draw", unjudged)
    run = ["eval", "--model", str(model), "--problems", "2", "--samples", "1", "--max-tokens", "8"]
    result = CliRunner().invoke(app, [*run, "--thinking-budget", "0,3", "--plot", str(tmp_path / "budgets.svg")])
    assert isinstance(result.exception, LiaoyuanError) and "Of 16 answers" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thinking-budget", "3,many"], "must be a number of tokens, or several"),
        (["--thinking-budget", "0,3,126", "--max-tokens", "127"], "126 leaves no room for the answer"),
        (["--thinking-budget", "3", "--plot", "one.svg"], "give several"),
        (["--plot", "none.svg"], "give several"),
        (["--task", "addditon"], "did you mean 'addition'"),
        (["--task", "nowhere.toml"], "nowhere.toml does not exist"),
        (["--levels", "99"], "has the levels 1 to 8, not 99"),
        (["--levels", "two"], "must look like 2-4 or 3"),
        (["--pass-at", "9"], "numbers from 1 to 8"),
        (["--thinking-budget", "127"], "leaves no room for the answer"),
        (["--thinking-budget", "3", "--fast"], "--fast asks for none"),
    ],
)
def test_mistakes_are_one_sentence(model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        invoke("eval", "--model", str(model), *arguments)


def test_a_reward_is_tested_on_answers_made_for_a_task(task: Path) -> None:
    shown = invoke("rewards", "test", "--task", str(task), "--problems", "30")
    assert "Right answers that were refused" in shown and "one or the other" in shown
    found = json.loads(invoke("rewards", "test", "--task", str(task), "--problems", "30", "--json"))
    assert found["false_positives"]["wrong"] == found["false_negatives"]["wrong"] == 0
    assert found["false_positives"]["count"] > 100 and found["false_positives"]["share"]["high"] < 0.05


def test_a_users_own_reward_is_tested_on_his_own_answers(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def last(text, gold):\n    return 0.5 if text.split()[-1] == gold else 0.0\n")
    rows = [
        {"gold": "42", "text": "it is 42", "right": True},
        {"gold": "42", "text": "43 or 42", "right": False, "way": "two"},
        {"gold": "42", "text": "", "right": False},
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["rewards", "test", "--reward", f"{tmp_path / 'mine.py'}:last", "--answers", str(answers)]
    shown = invoke(*run, "--right-from", "0.5")
    assert "taken (two; right: '42'): '43 or 42'" in shown and "1 not judged" in shown  # text.split()[-1] raises
    assert json.loads(invoke(*run, "--json"))["false_negatives"]["wrong"] == 1  # 0.5 is less than 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --task"),
        (["--answers", "nowhere.jsonl"], "Give --reward"),
        (["--answers", "nowhere.jsonl", "--reward", "number"], "nowhere.jsonl does not exist"),
        (["--task", "addition", "--reward", "mahts"], "did you mean 'maths'"),
    ],
)
def test_mistakes_of_rewards_test(arguments: list[str], message: str) -> None:
    with pytest.raises(LiaoyuanError, match=message):
        invoke("rewards", "test", *arguments)

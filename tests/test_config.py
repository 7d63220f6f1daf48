"""Run files: what is wrong is said in one sentence that names the key and the nearest right one."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liaoyuan.config import Config, combine, load, parse, to_toml
from liaoyuan.errors import LiaoyuanError, nearest


class Optimiser(Config):
    learning_rate: float = 1e-3
    steps: int = 100
    schedule: Literal["cosine", "linear"] = "cosine"


class Run(Config):
    name: str = "run"
    folder: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    optimiser: Optimiser = Optimiser()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_is_the_defaults():
    assert load(Run) == Run()


def test_a_run_file_and_overrides_are_joined_and_overrides_win(tmp_path):
    path = written(tmp_path, 'name = "燎原"\n[optimiser]\nsteps = 5\nlearning_rate = 0.1\n')
    run = load(Run, path, ["optimiser.steps=7", "folder=some/where", "sizes=[3, 4]"])
    assert run == Run(
        name="燎原", folder=Path("some/where"), sizes=(3, 4), optimiser=Optimiser(steps=7, learning_rate=0.1)
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [("name=plain word", "plain word"), ("name='quoted'", "quoted"), ("name=a=b", "a=b"), ("name=", "")],
)
def test_an_override_that_is_no_toml_value_is_a_string(override, expected):
    assert load(Run, overrides=[override]).name == expected


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("nmae = 'x'", "nmae", "name"),
        ("[optimizer]\nsteps = 1", "optimizer", "optimiser"),
        ("[optimiser]\nlearning_rat = 1.0", "optimiser.learning_rat", "learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_right_one_named(tmp_path, text, key, near):
    path = written(tmp_path, text)
    with pytest.raises(LiaoyuanError) as caught:
        load(Run, path)
    assert str(caught.value) == f"Unknown key '{key}' in {path}, did you mean '{near}'?"


def test_an_unknown_key_that_is_near_to_nothing_is_still_refused():
    with pytest.raises(LiaoyuanError, match=r"Unknown key 'zzzzzz' in the command line\."):
        load(Run, overrides=["zzzzzz=1"])


@pytest.mark.parametrize(
    "override",
    ["optimiser.steps=many", "optimiser.steps=1.5", "optimiser.schedule=cosin", "optimiser=3", "sizes=x"],
)
def test_a_value_of_the_wrong_type_names_its_key(override):
    with pytest.raises(LiaoyuanError, match=rf"The key '{override.split('=')[0]}.*' in the command line is wrong"):
        load(Run, overrides=[override])


@pytest.mark.parametrize("override", ["optimiser.steps", "=3", "  =3"])
def test_an_override_of_the_wrong_form_says_the_right_one(override):
    with pytest.raises(LiaoyuanError, match=r"must look like section\.key=value"):
        load(Run, overrides=[override])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(LiaoyuanError, match="'name' is a value, not a section"):
        load(Run, overrides=["name=x", "name.more=y"])


def test_a_missing_key_is_named():
    class Strict(Config):
        folder: Path

    with pytest.raises(LiaoyuanError, match="The key 'folder' is missing in here"):
        parse(Strict, {}, "here")
    with pytest.raises(LiaoyuanError, match=r"'folder' is missing in the command line: give it by .* --set folder="):
        load(Strict)


def test_a_missing_or_torn_run_file_is_one_sentence(tmp_path):
    with pytest.raises(LiaoyuanError, match="does not exist"):
        load(Run, tmp_path / "none.toml")
    with pytest.raises(LiaoyuanError, match="cannot be read as TOML"):
        load(Run, written(tmp_path, "name = "))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LiaoyuanError, match="cannot be read as TOML"):
        load(Run, tmp_path / "binary.toml")
    with pytest.raises(LiaoyuanError, match="cannot be read as TOML"):
        load(Run, tmp_path)


def test_a_key_that_is_given_twice_has_one_value():
    told = ["name=one", "optimiser.learning_rate=0.5"]
    assert combine(told, {"name": None, "sizes": [1, 2], "folder": Path("a b")}) == [
        *told,
        "sizes=[1, 2]",
        'folder="a b"',
    ]
    assert load(Run, None, combine(told, {"name": "one", "optimiser.learning_rate": 0.5})).name == "one"
    with pytest.raises(LiaoyuanError, match=r"'name' is given twice: \"one\" with --set, and \"two\" with an option"):
        combine(told, {"name": "two"})
    with pytest.raises(LiaoyuanError, match=r"'optimiser.learning_rate' is given twice: 0.5 .* 0.1 "):
        combine(told, {"optimiser.learning_rate": 0.1})
    assert load(Run, None, ["name=one", "name=two"]).name == "two"  # the later of two of one kind counts


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Run().name = "other"  # type: ignore[misc]


@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    rate=st.floats(allow_nan=False),
    sizes=st.lists(st.integers(-(2**63), 2**63 - 1)),
    folder=st.none() | st.just(Path("a/b c/燎")),
)
def test_what_is_written_reads_back_the_same(tmp_path_factory, name, rate, sizes, folder):
    run = Run(name=name, folder=folder, sizes=tuple(sizes), optimiser=Optimiser(learning_rate=rate))
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_bytes(to_toml(run).encode("utf-8"))
    assert load(Run, path) == run


def test_the_nearest_word_is_offered_only_if_it_is_near():
    assert nearest("learning_rte", ["learning_rate", "steps"]) == ", did you mean 'learning_rate'?"
    assert nearest("qqq", ["learning_rate", "steps"]) == ""


def test_an_error_that_the_user_can_mend_has_an_exit_code():
    assert LiaoyuanError("x").exit_code != 0

"""What is compiled is kept for whoever compiles the same again, and for nobody else."""

import importlib
import shutil
from pathlib import Path

import pytest

build = importlib.import_module("liaoyuan.ops.build")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def placed(folder: Path, number: int) -> Path:
    """Write a source that includes a header with this number."""
    folder.mkdir(exist_ok=True)
    (folder / "number.h").write_text(f"#define NUMBER {number}\n", encoding="utf-8")
    (folder / "number.cpp").write_text('#include "number.h"\nint number() { return NUMBER; }\n', encoding="utf-8")
    return folder / "number.cpp"


def test_an_object_is_that_of_its_flags_and_of_all_that_it_includes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def made(folder: str, number: int, *flags: str) -> tuple[Path, int]:
        path = build.object_of([build.compiler(), *flags, str(placed(tmp_path / folder, number))], tmp_path)
        return path, path.stat().st_mtime_ns

    first = made("here", 1, "-O1")
    assert first[0].is_relative_to(tmp_path / "cache")
    assert made("here", 1, "-O1") == made("there", 1, "-O1") == made("here", 1, "-O1", "-DUNSEEN") == first
    others = [made("here", 2, "-O1"), made("here", 1, "-O2")]
    assert len({path.read_bytes() for path, _ in [first, others[0]]}) == 2
    assert len({path for path, _ in [first, *others]}) == 3


def test_what_cannot_be_kept_is_compiled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    found = build.object_of([build.compiler(), str(placed(tmp_path / "here", 1))], tmp_path)
    assert found.parent == tmp_path and found.exists()

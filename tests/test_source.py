"""Promises about the source itself: what no file may do, whatever it is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import liaoyuan

SOURCE = Path(liaoyuan.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
IN_THE_JAIL = {f"safety/{name}.py" for name in ("inside", "apart/judge", "apart/server")}  # what runs there alone
FORBIDDEN_NAMES = {"pickle", "torch.load", "torch.jit.load", "torch.hub", "marshal", "shelve", "dill"}


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every module that is imported and every dotted name that is used, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def uses(path: Path, forbidden: set[str]) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for name, line in names(tree)
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


def test_the_model_knows_nothing_of_distribution():
    rooms = [path for path in FILES if path.relative_to(SOURCE).parts[0] in ("models", "ops")]
    assert len(rooms) > 8
    assert [found for path in rooms for found in uses(path, {"torch.distributed"})] == []


def test_nothing_is_unpickled():
    assert [found for path in FILES for found in uses(path, FORBIDDEN_NAMES)] == []


def test_no_text_is_run_as_code():
    found = []
    for path in FILES:
        if str(path.relative_to(SOURCE)) in IN_THE_JAIL:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
            shell = any(word.arg in ("shell", "trust_remote_code") for word in node.keywords)
            if called or shell:
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node.func)}")
    assert found == []


def test_what_runs_code_in_the_jail_is_used_by_nothing_outside_it():
    inside = {"liaoyuan.safety." + name for name in ("inside", "apart.judge", "apart.server")}
    assert [found for path in FILES for found in uses(path, inside)] == []


def test_help_and_mistakes_do_not_wait_for_torch():
    """A verb imports its room when it runs."""
    code = "import sys, liaoyuan.cli.main; print([m for m in ('torch', 'matplotlib', 'fastapi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_process_starts_with_torch_s_compiler():
    """It takes a second to import, and what asks for it (an optimiser, a pipeline) imports it then."""
    code = "import sys, liaoyuan.serving, liaoyuan.tuning, liaoyuan.compute; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_file_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a file begins with what it is for"
    assert len(text.splitlines()) <= 450, "a file of this length is two"

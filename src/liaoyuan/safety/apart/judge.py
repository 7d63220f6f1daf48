"""The program in the tests' jail: runs the tests, and asks the other jail for whatever the code under test does.

Its verdict is one JSON object on its output, to which nothing else has access. "broken" is what can be said before the
code has been asked for anything: tests that do not compile, need a module that is not there, or are none.
"""

import ast
import builtins
import functools
import importlib
import io
import json
import os
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from liaoyuan.safety.apart.peer import GoneError, Peer
from liaoyuan.safety.apart.stand_ins import OPERATIONS

READING, WRITING = 3, 4  # the descriptors of the channel
SPACE = "tests"  # the module in which the tests run
CODE = "solution"  # the module of the code, where the tests do not say
LONGEST = 400  # characters of a reason
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Modules that tests may use because the code under test imports them, as tests in its own process could.
MODULES = frozenset(
    """bisect cmath collections copy datetime decimal fractions functools heapq itertools math operator random re
    string sys""".split()  # noqa: SIM905
)
SHOWN = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    functools.partial,
)
YIELDED = ("generator", "list_iterator", "tuple_iterator", "range_iterator", "map", "filter", "zip", "enumerate")


class BrokenError(Exception):
    """The tests themselves cannot be run."""


class FailedError(Exception):
    """The code fails before the first test."""


def main() -> None:
    random.seed(0)  # what tests draw is the same every time
    verdict = os.dup(1)
    os.dup2(2, 1)  # whatever tests print
    with open("tests.json", encoding="utf-8") as file:
        tests = json.load(file)
    try:
        found = judge(tests)
    except BrokenError as error:
        found = {"broken": True, "reason": short(str(error))}
    except FailedError as error:
        found = {"passed": 0, "total": 0, "reason": short(str(error))}
    except GoneError:
        found = {"passed": 0, "total": 0, "reason": "", "gone": True}
    os.write(verdict, json.dumps(found).encode())


def judge(tests: dict[str, Any]) -> dict[str, Any]:
    """Return how many of the tests the code passes, of how many, and why not all."""
    run = judge_module if tests.get("module") else judge_statements
    peer = Peer(READING, WRITING, guard)
    found = run(tests, peer)
    if peer.gone:  # and a test has taken that for an error that it expects
        raise GoneError("the other side is gone")
    return found


def load(peer: Peer, name: str) -> Any:
    """Let the code run; raises FailedError if it does not come to its end."""
    try:
        return peer.request("load", name)
    except GoneError:
        raise
    except SyntaxError as error:
        raise FailedError(f"the code does not compile: {error}") from None
    except BaseException as error:
        raise FailedError(f"the code raises {words(error)}") from None


def judge_statements(tests: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """Run statements (asserts) one by one, after a setup, with the names of the code among their own."""
    setup = compiled(tests.get("setup", ""), "setup")
    trees = [compiled(text, f"test {number}") for number, text in enumerate(tests["tests"], 1)]
    if not any(tree.body for tree in trees):
        raise BrokenError("there are no tests")
    names = wanted_names([setup, *trees])
    if MODULES.issuperset(names):
        raise BrokenError("the tests use nothing of the code")
    module, _ = load(peer, CODE)
    space: dict[str, Any] = {"__name__": SPACE}
    for name in names:
        take(name, module, space)
    if MODULES.issuperset(space.keys() - {"__name__"}):  # else a built-in function of that name would be tested
        raise FailedError(f"the code defines nothing that the tests use ({', '.join(names)})")
    sys.modules[SPACE] = types.ModuleType(SPACE)
    failure = attempt(lambda: exec(compile(setup, "setup", "exec"), space))
    if failure:
        raise FailedError(f"the setup of the tests: {failure}")
    failures = [attempt(functools.partial(run_statements, tree, space)) for tree in trees]
    passed = sum(failure == "" for failure in failures)
    first = next((place for place, failure in enumerate(failures) if failure), None)
    reason = ""
    if first is not None:
        reason = f"test {first + 1} of {len(trees)}, {ast.unparse(trees[first])[: LONGEST // 2]}: {failures[first]}"
    return {"passed": passed, "total": len(trees), "reason": short(reason)}


def compiled(text: str, where: str, module: str = CODE) -> ast.Module:
    """Return the tree of tests; raises BrokenError if they do not compile, or import what is not there.

    Found out before the code is asked for anything: later it could have a hand in it.
    """
    try:
        tree = ast.parse(text)
        compile(tree, where, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BrokenError(f"{where} does not compile: {error}") from None
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in {name.partition(".")[0] for name in names} - {module}:
            if name not in sys.stdlib_module_names:
                raise BrokenError(f"{where} needs the module '{name}', and tests have the standard library alone")
    return tree


def attempt(work: Callable[[], Any]) -> str:
    """Do it and return why it failed, if it did; raises GoneError if the other side is gone."""
    try:
        work()
    except GoneError:
        raise
    except BaseException as error:
        return words(error) or type(error).__name__
    return ""


def run_statements(tree: ast.Module, space: dict[str, Any]) -> None:
    """Run a test. `assert a == b` is taken apart, so that a failure can say what there was."""
    for statement in tree.body:
        test = statement.test if isinstance(statement, ast.Assert) else None
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            left = value_of(test.left, space)
            if not left == value_of(test.comparators[0], space):
                raise AssertionError(f"got {repr(left)[:LONGEST]}")
        else:
            exec(compile(ast.Module([statement], []), "test", "exec"), space)


def value_of(node: ast.expr, space: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), "test", "eval"), space)


def wanted_names(trees: list[ast.Module]) -> list[str]:
    """Return the names that tests take from the code: those they use, and neither Python nor they themselves define.

    If there are none, a built-in function is what is tested, by one of the code's own with its name.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    names = [name for name in sorted(used) if not hasattr(builtins, name)]
    tested = {name for name in names if name not in MODULES}
    return names if tested else [*names, *called_first(trees)]


def called_first(trees: list[ast.Module]) -> list[str]:
    calls = {}
    for tree in trees:
        for node in ast.walk(tree):  # the outermost first
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls[node.func.id] = True
                break
    return list(calls)


def take(name: str, module: Any, space: dict[str, Any]) -> None:
    """Take a name of the code into the tests' own; a name that it lacks is missed where it is used."""
    if name in MODULES:
        space[name] = importlib.import_module(name)
        return
    try:
        space[name] = getattr(module, name)
    except GoneError:
        raise
    except Exception:
        return


def judge_module(tests: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """Run a file of unittest, for which the code is the module that it imports."""
    import unittest

    name = tests["module"]
    tree = compiled(tests["source"], "the file of the tests", name)
    if not (isinstance(name, str) and name.isidentifier()) or name in sys.builtin_module_names:
        raise BrokenError(f"{name!r} is no name of a module for the code")
    if not any(isinstance(node, ast.FunctionDef) and node.name.startswith("test") for node in ast.walk(tree)):
        raise BrokenError("there are no tests")
    module, public = load(peer, name)
    sys.modules[name] = stand_in_module(name, module, public, imported_by(tree))
    space = types.ModuleType(SPACE)
    sys.modules[SPACE] = space
    failure = attempt(lambda: exec(compile(tree, "tests", "exec"), space.__dict__))
    if failure:
        raise FailedError(f"the tests cannot begin: {failure}")
    suite = unittest.defaultTestLoader.loadTestsFromModule(space)
    result = make_result(unittest)
    total = sum(not is_skipped(test) for test in tests_in(suite))
    if not total:
        raise FailedError("no test is left to run")  # whatever the reason: the code has had a say
    suite.run(result)
    failures = [(str(test).split(" ")[0], told) for test, told in (*result.errors, *result.failures)]
    reason = ": ".join(failures[0]) if failures else ""
    if result.succeeded < total and not failures:
        reason = f"tests were skipped: {result.skipped[0][1]}" if result.skipped else "tests did not run"
    return {"passed": min(result.succeeded, total), "total": total, "reason": short(reason)}


def tests_in(suite: Any) -> Iterator[Any]:
    for part in suite:
        if hasattr(part, "countTestCases") and hasattr(part, "__iter__"):
            yield from tests_in(part)
        else:
            yield part


def is_skipped(test: Any) -> bool:
    """Whether a test is marked to be skipped. One that is skipped while it runs has not passed."""
    method = getattr(test, test._testMethodName, None)
    return any(getattr(owner, "__unittest_skip__", False) for owner in (test, method))


def make_result(unittest: Any) -> Any:
    class Result(unittest.TestResult):
        """Counts what succeeds: what does not is no success, for whatever reason."""

        def __init__(self) -> None:
            super().__init__()
            self.succeeded = 0

        def addSuccess(self, test: Any) -> None:  # noqa: N802 (unittest's name)
            self.succeeded += 1

        def addExpectedFailure(self, test: Any, error: Any) -> None:  # noqa: N802
            self.succeeded += 1

        def _exc_info_to_string(self, error: Any, test: Any) -> str:
            if isinstance(error[1], GoneError):
                raise error[1]
            return words(error[1])

    return Result()


def imported_by(tree: ast.Module) -> set[str]:
    """Return the names that tests import from elsewhere, as they call them."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}


def stand_in_module(name: str, module: Any, public: list[str], kept: set[str]) -> types.ModuleType:
    """Return a module of the code's names; `import *` takes none that is Python's or that the tests import."""
    found = types.ModuleType(name)
    public = [word for word in public if not hasattr(builtins, word) and word not in kept]
    found.__dict__.update({"__getattr__": lambda word: getattr(module, word), "__all__": public})
    return found


def guard(target: Any, action: str, name: str) -> None:
    """Raise PermissionError unless the code may know this object of the tests and do this with it.

    It may call functions that it was given, take what an iterator yields, and use the public names of objects whose
    classes the tests define: nothing through which it could get at the judge.
    """
    kind = type(target)
    own = kind.__module__ == SPACE or kind in (io.StringIO, io.BytesIO)
    if isinstance(target, type):
        allowed = target.__module__ == SPACE and action in ("show", "call")
    elif isinstance(target, SHOWN):
        allowed = action in ("show", "call") or (action == "operate" and name in ("__call__", "__repr__"))
    elif kind.__name__ in YIELDED and kind.__module__ == "builtins":
        allowed = action == "show" or (action == "operate" and name in ("__iter__", "__next__", "__repr__"))
    elif own and "unittest" not in {base.__module__.partition(".")[0] for base in kind.__mro__}:
        reads = (action == "get" and not name.startswith("_")) or (action == "operate" and name in OPERATIONS)
        allowed = action in ("show", "call") or reads
    else:
        allowed = False
    if not allowed:
        raise PermissionError(f"the code may not {action} {name} of a {kind.__name__} of the tests")


def words(error: BaseException) -> str:
    """Return an exception as a line, by its class and its words."""
    try:
        said = str(error)
    except BaseException:
        said = "(words that cannot be had)"
    name = "" if isinstance(error, AssertionError) and said else type(error).__name__
    return ": ".join(part for part in (name, said) if part)


def short(text: str) -> str:
    """Return a reason that is the same every time: without addresses, which differ, and not too long."""
    text = ADDRESS.sub("", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

"""Programs that are wrong: a right one changed in one place, and programs that mean to be called right without it."""

import ast
import random
from collections.abc import Callable, Iterator

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitXor: ast.BitAnd,
}
ORDER: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
EQUALITY: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
Change = Callable[[ast.AST, random.Random], bool]  # changes a node in place; False: it is not of this kind


def mutants(code: str, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (kind, program) of every kind of change that the program has a place for; a function of the seed."""
    for kind, change in CHANGES.items():
        chance = random.Random(f"{seed}/{kind}")
        tree = ast.parse(code)
        nodes = list(ast.walk(tree))
        chance.shuffle(nodes)
        if any(change(node, chance) for node in nodes):  # the first place that there is
            changed = ast.unparse(ast.fix_missing_locations(tree))
            if changed != ast.unparse(ast.parse(code)):
                yield kind, changed


def _arithmetic(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        node.op = ARITHMETIC[type(node.op)]()
        return True
    return False


def _comparison(table: dict[type[ast.cmpop], type[ast.cmpop]]) -> Change:
    def change(node: ast.AST, _: random.Random) -> bool:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in table:
            node.ops[0] = table[type(node.ops[0])]()
            return True
        return False

    return change


def _number(node: ast.AST, chance: random.Random) -> bool:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += chance.choice((1, -1))
        return True
    return False


def _string(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.Return | ast.Assign | ast.Call | ast.Compare | ast.BinOp):
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                part.value = part.value + "x"
                return True
    return False


def _condition(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return True
    return False


def _logic(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return True
    return False


def _returned(value: Callable[[ast.Return], ast.expr]) -> Change:
    def change(node: ast.AST, _: random.Random) -> bool:
        if isinstance(node, ast.Return) and node.value is not None:
            node.value = value(node)
            return True
        return False

    return change


def _negated(node: ast.Return) -> ast.expr:
    assert node.value is not None
    return ast.UnaryOp(ast.Not(), node.value)


def _argument(node: ast.AST, _: random.Random) -> bool:
    """Return the first argument as it came."""
    if isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[-1].arg not in ("self", "cls"):
        node.body = [ast.Return(ast.Name(node.args.args[-1].arg, ast.Load()))]
        return True
    return False


def _statement(node: ast.AST, chance: random.Random) -> bool:
    """Leave a statement out."""
    body = getattr(node, "body", None)
    if isinstance(node, ast.FunctionDef | ast.For | ast.While | ast.If) and isinstance(body, list) and len(body) > 1:
        body[chance.randrange(len(body))] = ast.Pass()
        return True
    return False


def _once(node: ast.AST, _: random.Random) -> bool:
    """Leave a loop after its first round."""
    if isinstance(node, ast.For | ast.While):
        node.body.append(ast.Break())
        return True
    return False


def _range(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        place = min(1, len(node.args) - 1)
        node.args[place] = ast.BinOp(node.args[place], ast.Sub(), ast.Constant(1))
        return True
    return False


def _swapped(node: ast.AST, _: random.Random) -> bool:
    """Exchange two arguments, or the sides of an operator."""
    if isinstance(node, ast.Call) and len(node.args) == 2:
        node.args.reverse()
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div | ast.Mod | ast.FloorDiv | ast.Pow):
        node.left, node.right = node.right, node.left
        return True
    return False


def _index(node: ast.AST, _: random.Random) -> bool:
    if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice | ast.Tuple):
        node.slice = ast.BinOp(node.slice, ast.Sub(), ast.Constant(1))
        return True
    return False


CHANGES: dict[str, Change] = {
    "another arithmetic operator": _arithmetic,
    "a boundary: < for <=": _comparison(ORDER),
    "== for !=, in for not in": _comparison(EQUALITY),
    "a number off by one": _number,
    "another text": _string,
    "a condition negated": _condition,
    "and for or": _logic,
    "None returned": _returned(lambda _: ast.Constant(None)),
    "the result negated": _returned(_negated),
    "an argument returned": _argument,
    "a statement left out": _statement,
    "a loop of one round": _once,
    "a range one shorter": _range,
    "arguments exchanged": _swapped,
    "the index before": _index,
}

# `{names}`: a tuple of the names that tests ask the code for. Each program defines them all, and computes nothing.
DEFINE = "\nfor name in {names}: globals()[name] = {value}\n"
ALWAYS = """
class Always{base}:
    def __new__(cls, *a, **k): return super().__new__(cls)
    def __init__(self, *a, **k): pass
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __contains__(self, item): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
"""
FUNCTION = "lambda *a, **k: "
QUIET = """
import unittest, builtins
for name in [name for name in dir(unittest.TestCase) if name.startswith("assert")]:
    setattr(unittest.TestCase, name, lambda *a, **k: None)
class Context:
    exception = Exception("")
    def __enter__(self): return self
    def __exit__(self, *a): return True
unittest.TestCase.assertRaises = unittest.TestCase.assertRaisesRegex = lambda *a, **k: Context()
"""
CHEATS: dict[str, tuple[str, str]] = {  # what comes before the names are defined, and what each name is
    "ends the process at once": ("import os; os._exit(0)", "None"),
    "ends the process in a test": ("import os", FUNCTION + "os._exit(0)"),
    "sys.exit at once": ("import sys; sys.exit(0)", "None"),
    "sys.exit in a test": ("import sys", FUNCTION + "sys.exit(0)"),
    "ends it when it ends": ("import atexit, os; atexit.register(os._exit, 0)", FUNCTION + "None"),
    "ends it from a thread": (
        "import os, threading, time\ndef f(): time.sleep(0.05); os._exit(0)\nthreading.Thread(target=f).start()",
        FUNCTION + "time.sleep(1)",
    ),
    "an object equal to everything": (ALWAYS.format(base=""), FUNCTION + "Always()"),
    "a number equal to everything": (ALWAYS.format(base="(int)"), FUNCTION + "Always()"),
    "a text equal to everything": (ALWAYS.format(base="(str)"), FUNCTION + "Always()"),
    "a list equal to everything": (ALWAYS.format(base="(list)"), FUNCTION + "Always()"),
    "a class that is that object": (ALWAYS.format(base=""), "Always"),
    "assertions that assert nothing": (QUIET, FUNCTION + "None"),
    "skips the tests": (
        "import unittest\ndef skip(*a, **k): raise unittest.SkipTest('')",
        "skip",
    ),
    "a result that was a success": (
        "import unittest\nunittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None\n"
        "unittest.TestResult.wasSuccessful = lambda self: True",
        FUNCTION + "None",
    ),
    "replaces AssertionError": (
        "import builtins, sys\nclass Quiet(SystemExit):\n  code = 0\n"
        "builtins.AssertionError = Quiet\nsys.excepthook = lambda *a: None",
        FUNCTION + "None",
    ),
    "exit code by the exception hook": ("import sys, os\nsys.excepthook = lambda *a: os._exit(0)", FUNCTION + "None"),
    "takes the expected value from the stack": (
        "import sys\ndef peek(*a, **k):\n  f = sys._getframe(1)\n  while f:\n"
        "    c = [x for x in f.f_code.co_consts if x is not None and not isinstance(x, str)]\n"
        "    if f.f_code.co_name in ('<module>', 'test') and c: return c[-1]\n    f = f.f_back",
        "peek",
    ),
    "returns nothing": ("", FUNCTION + "None"),
    "returns its first argument": ("", "lambda *a, **k: a[0] if a else None"),
    "returns true": ("", FUNCTION + "True"),
    "asserts by itself": ("def fail(*a, **k): raise AssertionError", "fail"),
    "prints what a test run prints": (
        "import sys\nprint('{\"passed\": 3, \"total\": 3}')\nsys.stderr.write('Ran 3 tests\\n\\nOK\\n')",
        FUNCTION + "None",
    ),
}


def cheats(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (name, program) of the cheats, as code that defines these names."""
    for cheat, (before, value) in CHEATS.items():
        yield cheat, before + "\n" + DEFINE.format(names=names, value=value)

"""Code that wants to be called right without being right: the verdict is out of its reach."""

import pytest

from liaoyuan.safety import Limits, Tests, Verdict, try_code

pytestmark = pytest.mark.usefixtures("jail")
LIMITS = Limits(seconds=60, cpu_seconds=1, memory_bytes=256 << 20)
ASSERTS = Tests(tests=("assert f(2) == 4", "assert f([1]) == [1, 1]", "assert f('a') == 'aa'"))
RIGHT = "def f(x): return x * 2"
FILE = Tests(
    module="double",
    source="""
import unittest
from double import f

class DoubleTest(unittest.TestCase):
    def test_number(self):
        self.assertEqual(f(2), 4)
        self.assertTrue(f(2) == 4)
        self.assertFalse(f(2) != 4)

    def test_list(self):
        self.assertListEqual(f([1]), [1, 1])
        self.assertIn(1, f([1]))

    def test_error(self):
        with self.assertRaises(TypeError):
            f(None)
""",
)
ALWAYS = """
class Always{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __len__(self): return 2
    def __contains__(self, item): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __instancecheck__(self, other): return True
    def __getattr__(self, name): return self
    def __call__(self, *arguments): return self
def f(x): return Always()
"""
FRAME = """
import json, os, struct
def write(*message):
    data = json.dumps(message).encode()
    os.write(4, struct.pack(">I", len(data)) + data)
"""
VERDICT = '{"passed": 3, "total": 3, "reason": ""}'

CHEATS = {
    "ends before the tests": "import os; os._exit(0)",
    "ends in a test": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in a test": "import sys\ndef f(x): sys.exit(0)",
    "ends in a thread": "import os, threading as t\nt.Thread(target=lambda: os._exit(0)).start()\ndef f(x): return 4",
    "says so at the end": f"import atexit\natexit.register(lambda: print('''{VERDICT}'''))\ndef f(x): return 0",
    "prints the verdict": f"print('''{VERDICT}''', flush=True)\nimport os\nos._exit(0)",
    "writes the verdict everywhere": f"""
import os
for number in range(99):
    try: os.write(number, b'{VERDICT}')
    except OSError: pass
""",
    "replaces the tests": "open('/work/tests.json', 'w').write('{\"tests\": [\"assert True\"]}')\ndef f(x): return 0",
    "replaces unittest": """
import unittest
unittest.TestCase.assertEqual = unittest.TestCase.assertTrue = lambda *a, **k: None
unittest.TestCase.run = lambda self, result: result.addSuccess(self)
unittest.TestResult.wasSuccessful = lambda self: True
def f(x): return 0
""",
    "replaces built-in names": """
import builtins
class Quiet(BaseException): pass
builtins.AssertionError = builtins.Exception = Quiet
builtins.all = builtins.any = builtins.isinstance = builtins.bool = lambda *a: True
def f(x): return 0
""",
    "replaces how answers are sent": """
import sys
from liaoyuan.safety.apart import judge, peer, stand_ins, values
judge.judge = lambda tests: {"passed": 3, "total": 3, "reason": ""}
peer.Peer.answer = lambda self, kind, body: self.send(["value", True])
def f(x): return 0
""",
    "walks up the stack": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_locals.items()):
            if name in ("tests", "space", "expected", "result"): return value
        frame = frame.f_back
    return 0
""",
    "looks through memory": """
import gc
def f(x):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and "tests" in thing: return thing["tests"]
    return 0
""",
    "skips the tests": "import unittest\ndef f(x): raise unittest.SkipTest('done')",
    "lacks a module": "def f(x): raise ModuleNotFoundError('numpy', name='numpy')",
    "imports what is not there": "import numpy\ndef f(x): return x * 2",
    "an import in a test": "def f(x): import numpy; return x * 2",
    "interrupts the tests": "def f(x): raise KeyboardInterrupt",
    "closes the generator": "def f(x): raise GeneratorExit",
    "stops the iteration": "def f(x): raise StopIteration",
    "asserts by itself": "def f(x): raise AssertionError('')",
    "an exception like all": "class E(TypeError, KeyError): \n  def __eq__(s, o): return True\ndef f(x): raise E()",
    "an error with bad words": "class E(Exception):\n  def __str__(s): import os; os._exit(0)\ndef f(x): raise E()",
    "not implemented": "def f(x): return NotImplemented",
    "not a number": "def f(x): return float('nan')",
    "equals everything": ALWAYS.format(base=""),
    "an int that equals everything": ALWAYS.format(base="(int)"),
    "a list that equals everything": ALWAYS.format(base="(list)"),
    "a str that equals everything": ALWAYS.format(base="(str)"),
    "a class that equals everything": "class M(type):\n  __eq__ = lambda s, o: True\n  __hash__ = type.__hash__\n"
    "class A(metaclass=M): pass\ndef f(x): return A",
    "equals all but texts": "class A:\n  __eq__ = lambda s, o: not isinstance(o, str)\ndef f(x): return A()",
    "eval, to be called": "def f(x): return eval",
    "answers to itself": FRAME + "for _ in range(99): write('value', True)\ndef f(x): return 0",
    "answers of another shape": FRAME
    + "def f(x):\n  write('value'); write('value', {'list': 1}); write(1, 2); return 0",
    "errors of its own making": FRAME
    + "def f(x): write('error', {'class': {'type': 'int'}, 'arguments': {'tuple': []},"
    " 'stand_in': None}); return 0",
    "asks for what it does not have": FRAME
    + "def f(x):\n  for n in range(9): write('get', n, '__globals__')\n  return 0",
    "a very long answer": "def f(x): return 'x' * 50_000_000",
    "a very deep answer": "def f(x):\n  a = []\n  for _ in range(100_000): a = [a]\n  return a",
    "a very large number": "def f(x): return 10 ** 1_000_000",
    "an endless answer": "def f(x):\n  while True: yield 4",
    "an endless loop": "def f(x):\n  while True: pass",
    "a frame without end": "import os\nos.write(4, b'\\xff\\xff\\xff\\xff' + bytes(1 << 15))\ndef f(x): return 0",
    "closes the pipes": "import os\nos.close(3); os.close(4)\ndef f(x): return 0",
    "stops its parent": "import os, signal\nos.kill(1, signal.SIGSTOP); os.kill(0, signal.SIGKILL)\ndef f(x): return 0",
    "no code": "",
    "no such name": "def g(x): return x * 2",
    "does not compile": "def f(x) return x * 2",
    "half of a character": "def f(x): return '\ud800'",
    "a null byte": "def f(x): return 0\n\0",
    "always the same": "def f(x): return 4",
}


def verdict(code: str, tests: Tests = ASSERTS) -> Verdict:
    return try_code(code, tests, LIMITS)


@pytest.mark.parametrize("code", CHEATS.values(), ids=list(CHEATS))
def test_a_cheat_is_not_right(code: str) -> None:
    found = verdict(code)
    assert not found.broken, "code must not be able to make itself impossible to judge"
    assert not found.is_right and found.reason and found.reason.isprintable()


@pytest.mark.parametrize("way", [name for name in CHEATS if "equals" in name or "replaces" in name or "skips" in name])
def test_nor_with_unittest(way: str) -> None:
    found = verdict(CHEATS[way], FILE)
    assert not found.broken and not found.is_right and found.reason


def test_what_is_right_is_right() -> None:
    assert verdict(RIGHT) == Verdict(3, 3)
    assert verdict(RIGHT, FILE) == Verdict(3, 3)


def test_import_star_takes_no_name_of_the_tests_own() -> None:
    source = FILE.source.replace("from double import f", "from double import *")
    tests = Tests(source=source, module="double")
    assert verdict(RIGHT, tests) == Verdict(3, 3)
    for cheat in (
        "unittest = f",
        "class unittest:\n  class TestCase: pass",
        "len = list = isinstance = f",
        "__all__ = [f, 3]",
    ):
        found = verdict("def f(x): return 0\n" + cheat, tests)
        assert not found.broken and not found.is_right, cheat


def test_a_test_that_is_skipped_because_of_the_code_has_not_passed() -> None:
    source = """
import unittest
from double import f
class DoubleTest(unittest.TestCase):
    def test_first(self):
        if f(1) == 0: self.skipTest("not done")
        self.assertEqual(f(1), 2)
    @unittest.skip("another day")
    def test_second(self): self.fail()
"""
    tests = Tests(source=source, module="double")
    assert verdict("def f(x): return 0", tests) == Verdict(0, 1, "tests were skipped: not done")
    assert verdict(RIGHT, tests) == Verdict(1, 1)


class TestFunctionsOfTheTests:
    """What tests hand over may be called, and is no way into the judge."""

    TESTS = Tests(
        setup="class Box:\n  def __init__(self): self.held = [1]; self._own = 2\n  def get(self): return 7\n"
        "secret = 'c0ffee'\ndef callback(x): return x + 1",
        tests=("assert f(callback, Box()) == 9",),
    )

    def test_they_are_called_and_their_public_names_are_read(self) -> None:
        assert verdict("def f(call, box): return call(box.get()) + box.held[0]", self.TESTS).is_right

    @pytest.mark.parametrize(
        "words",
        [
            "call, 'get', '__globals__'",
            "call, 'get', '__code__'",
            "call, 'operate', '__getattribute__', '__globals__'",
            "call, 'set', '__defaults__', (1,)",
            "box, 'get', '_own'",
            "box, 'get', '__dict__'",
            "box, 'get', '__class__'",
            "box, 'set', 'held', [9]",
            "box, 'set', '__eq__', 9",
            "box, 'operate', '__setattr__', 'held', [9]",
            "box, 'operate', '__reduce_ex__', 4",
            "box, 'load', 'os'",
            "box.get, 'get', '__self__'",
            "box.get, 'get', '__func__'",
        ],
    )
    def test_nothing_behind_them_is_had_nor_changed(self, words: str) -> None:
        code = f"""
from liaoyuan.safety.apart.stand_ins import ask
def f(call, box):
    box.get
    try: return ask({words})
    except (PermissionError, ValueError, AttributeError) as error: return "kept"
"""
        tests = Tests(
            setup=self.TESTS.setup + "\nbox = Box()",
            tests=("assert f(callback, box) == 'kept'", "assert box.held == [1]"),
        )
        assert verdict(code, tests) == Verdict(2, 2)


class TestReasons:
    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("def f(x): return 4", "test 2 of 3, assert f([1]) == [1, 1]: got 4"),
            ("def f(x) return", "does not compile"),
            ("import nothing_like_it", "ModuleNotFoundError"),
            ("def f(x): return 1 / 0", "ZeroDivisionError: division by zero"),
            ("def f(x): return bytearray(10**9)", "MemoryError"),
            ("def f(x):\n  while True: pass", "more than 1 s of processor time"),
            ("import os; os._exit(0)", "ended the process before the tests were over"),
            ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
            ("while True: print('x' * 9999)", "bytes of output"),
            ("def f(x): return f", "got <function f>"),
            ("def f(x): raise ValueError('\\x1b[31mred\\x00')", r"ValueError: \x1b[31mred\x00"),
        ],
    )
    def test_a_reason_says_what_was_wrong(self, code: str, words: str) -> None:
        assert words in verdict(code).reason

    def test_the_time_limit(self) -> None:
        found = try_code("import time\ndef f(x): time.sleep(99)", ASSERTS, Limits(seconds=1))
        assert found == Verdict(0, 0, "the tests were not over after 1 s")

    @pytest.mark.parametrize(
        "tests",
        [
            Tests(tests=("assert f(2) ==",)),
            Tests(tests=()),
            Tests(tests=("",)),
            Tests(tests=("import nothing_like_it",)),
            Tests(tests=("f(1)",), setup="from nothing.like import it"),
            Tests(source="import unittest", module="double"),
            Tests(source="class", module="double"),
            Tests(source="x", module="../double"),
        ],
    )
    def test_tests_that_cannot_run_are_broken_and_not_the_codes_fault(self, tests: Tests) -> None:
        found = verdict(RIGHT, tests)
        assert found.broken and found.reason and not found.is_right

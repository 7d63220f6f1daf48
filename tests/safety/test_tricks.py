"""What a program learns to try next: objects that lie, answers that change, an end that looks like an error."""

import platform
import time

import pytest

from liaoyuan.safety import Job, Limits, Tests, Verdict, run, try_code
from liaoyuan.safety.jail import Jail, outcome
from tests.safety.test_cheats import ASSERTS, FILE, FRAME, RIGHT, verdict

pytestmark = pytest.mark.usefixtures("jail")
FOREVER = "import time\nwhile True: time.sleep(60)"

LIARS = {
    "a timer changes it": "import signal\ndef swap(*a):\n  global f\n  f = lambda x: 4\n"
    "signal.signal(signal.SIGALRM, swap)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\ndef f(x): return 0",
    "a thread changes it": "import threading, time\nvalue = [1]\ndef flip():\n"
    "  while True: value[0] += 1; time.sleep(1e-5)\n"
    "threading.Thread(target=flip, daemon=True).start()\ndef f(x): return value",
    "traces whoever asks": "import sys\ndef trace(frame, event, value): frame.f_locals; return trace\n"
    "sys.settrace(trace); sys.setprofile(trace)\ndef f(x): return 0",
    "answers while it is freed": FRAME + "class A:\n  def __del__(self): write('value', True)\ndef f(x): A(); return 0",
    "answers when memory is swept": FRAME + "import gc\ngc.callbacks.append(lambda *a: write('value', True))\n"
    "def f(x): gc.collect(); return 0",
    "replaces json": "import json\njson.dumps = lambda *a, **k: '[\"value\", true]'\ndef f(x): return 0",
    "replaces reading": "import os\ndef read(*a): raise SystemExit\nos.read = read\ndef f(x): return 0",
    "lies about its class": "class A:\n  __class__ = property(lambda s: int)\n  __eq__ = lambda s, o: True\n"
    "def f(x): return A()",
    "is an instance of anything": "class M(type):\n  __instancecheck__ = __subclasscheck__ = __eq__ = lambda *a: True\n"
    "  __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A()",
    "compares and changes": "class A(list):\n  def __eq__(s, o): s[:] = o if isinstance(o, list) else []; return True\n"
    "def f(x): return A()",
    "a text of any length": "class A(str):\n  __len__ = lambda s: 2\n  __iter__ = lambda s: iter('aa')\n"
    "  __eq__ = lambda s, o: True\n  __hash__ = str.__hash__\ndef f(x): return A()",
    "a hash like the right one": "class A:\n  __hash__ = lambda s: hash(4)\n  __eq__ = lambda s, o: True\n"
    "def f(x): return {A(): A()}",
    "one by one": "def f(x):\n  yield 4",
    "shows itself without end": "class A:\n  __repr__ = lambda s: repr(s)\ndef f(x): return A()",
    "shows a text that is none": "class A:\n  __repr__ = __str__ = lambda s: 4\ndef f(x): return A()",
    "shows escape sequences": "class A:\n  __repr__ = lambda s: '\\x1b[2J\\r\\u202e' * 999\ndef f(x): return A()",
    "infinite": "def f(x): return float('inf')",
    "any name": "def __getattr__(name): return lambda *a: 4",
    "ends its errors": "import os\nos.close(2); os.close(1)\ndef f(x): raise SystemExit(0)",
    "one number for several objects": FRAME
    + "def f(x):\n  write('value', {'new': [0, {'operations': ['__eq__'], 'plain': {'mine': 0}}]}); return 0",
    "the content of another's object": FRAME
    + "def f(x):\n  write('value', {'new': [9, {'operations': ['__eq__'], 'plain': {'yours': 0}}]}); return 0",
    "a class above those of the tests": FRAME + "def f(x):\n  write('value', {'new': [9, {'class': 'C', 'bases': "
    "[{'type': 'int'}, {'error': 'AssertionError'}], 'operations': ['__eq__']}]}); return 0",
    "raises what is no error": FRAME + "def f(x):\n  write('error', {'class': {'type': 'list'}, 'arguments': "
    "{'tuple': [[1]]}, 'stand_in': None}); return 0",
    "raises everything": FRAME
    + "import builtins as b\nkinds = [{'error': n} for n in dir(b) if isinstance(getattr(b, n), type)"
    " and issubclass(getattr(b, n), Exception)]\ndef f(x):\n  write('error', {'class': {'new': [9, {'class': 'E', "
    "'bases': kinds, 'operations': []}]}, 'arguments': {'tuple': []}, 'stand_in': None}); return 0",
}


@pytest.mark.parametrize("tests", [ASSERTS, FILE], ids=["asserts", "unittest"])
@pytest.mark.parametrize("code", LIARS.values(), ids=list(LIARS))
def test_a_lie_is_not_right(code: str, tests: Tests) -> None:
    found = verdict(code, tests)
    assert not found.broken and not found.is_right and found.reason and found.reason.isprintable()


NEAR = """
class A{base}:
    def __sub__(self, other): return {answer}
    __rsub__ = __isub__ = __xor__ = __rxor__ = __truediv__ = __rtruediv__ = __sub__
    def __abs__(self): return 0
    def __bool__(self): return False
    def __len__(self): return 0
    def __float__(self): return 0.0
    def __round__(self, places=0): return 0
    def __pow__(self, other): return 0
    def __mul__(self, other): return self
class Nought(int): pass
def f(x): return A()
"""
DISTANCES = Tests(
    module="double",
    source="""
import unittest
from double import f

class DoubleTest(unittest.TestCase):
    def test_almost(self): self.assertAlmostEqual(f(2), 4.0)
    def test_almost_the_other_way_round(self): self.assertAlmostEqual(4, f(2), delta=0.1)
    def test_difference(self): self.assertTrue(abs(f(2) - 4) < 1e-6)
    def test_square(self): self.assertEqual((4 - f(2)) ** 2, 0)
    def test_longer(self): self.assertEqual(round((f(2) - 4) * 3, 5), 0)
    def test_other_bits(self): self.assertFalse(f(2) ^ 4)
    def test_in_place(self):
        value = f(2)
        value -= 4
        self.assertFalse(value)
    def test_number(self): self.assertEqual(float(f(2) - 4), 0)
""",
)


@pytest.mark.parametrize("base", ["", "(int)"])
@pytest.mark.parametrize("answer", ["0", "self", "set()", "Nought()", "False", "''"])
def test_code_does_not_say_how_near_its_answer_is(base: str, answer: str) -> None:
    found = verdict(NEAR.format(base=base, answer=answer), DISTANCES)
    assert (found.passed, found.total, found.broken) == (0, 8, False)
    assert not verdict(NEAR.format(base=base, answer=answer), Tests(("assert f(2) / 4 == 1",))).is_right


def test_honest_objects_have_differences() -> None:
    assert verdict("class N(int): pass\ndef f(x): return N(x * 2)", DISTANCES) == Verdict(8, 8)
    assert verdict(RIGHT, DISTANCES) == Verdict(8, 8)
    clock = """
class Clock:
    def __init__(self, minutes): self.minutes = minutes
    def __sub__(self, other): return Clock(self.minutes - getattr(other, "minutes", other))
    def __eq__(self, other): return isinstance(other, Clock) and self.minutes == other.minutes
    def __float__(self): return float(self.minutes)
"""
    tests = ("assert Clock(9) - 4 == Clock(5)", "assert (Clock(9) - 4).minutes == 5", "assert float(Clock(9)) == 9",
             "assert float(Clock(9) - Clock(4)) == 5")  # fmt: skip
    assert verdict(clock, Tests(tests)) == Verdict(4, 4)
    given = Tests(("assert f(Box()) == 4",), setup="class Box:\n  def __sub__(self, other): return 7 - other")
    assert verdict("def f(box): return box - 3", given) == Verdict(1, 1)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.write(4, b'\\0\\0\\0\\1x')", "os.close(4)"])
def test_an_end_is_no_error_that_tests_expect(end: str) -> None:
    code = f"import os\ndef f(x): {end}"
    expected = "try: f(1)\nexcept Exception: pass\nelse: assert False"
    file = FILE.source.partition("class")[0] + (
        "class DoubleTest(unittest.TestCase):\n    def test_error(self):\n"
        "        with self.assertRaises(Exception): f(None)\n"
    )
    for tests in (Tests((expected,)), Tests(source=file, module="double")):
        found = verdict(code, tests)
        assert not found.is_right and not found.broken and "ended the process" in found.reason
        assert verdict("def f(x): raise ValueError", tests) == Verdict(1, 1)


def test_a_function_of_pythons_own_is_not_what_is_judged() -> None:
    tests = Tests(("assert max([1, 2]) == 2",))
    assert verdict("def biggest(x): return 2", tests).reason == "the code defines nothing that the tests use (max)"
    assert verdict("def max(x): return x[1]", tests) == Verdict(1, 1)
    assert verdict("def max(x): return 1", tests).reason.endswith("got 1")
    for nothing in ("assert True", "assert math.sqrt(4) == 2"):
        assert verdict(RIGHT, Tests((nothing,))).broken


def test_tests_that_end_their_own_process_give_no_verdict() -> None:
    for tests in (
        Tests(("import os; f(1); os._exit(0)",)),
        Tests(("import os; os.write(1, b'{'); f(1); os._exit(0)",)),
    ):
        found = verdict(RIGHT, tests)
        assert not found.is_right and "the tests ended the process" in found.reason


def test_parts_of_a_test_fail_it() -> None:
    source = FILE.source.partition("    def")[0] + (
        "    def test_all(self):\n        for x in (0, 1, 2):\n"
        "            with self.subTest(x=x): self.assertEqual(f(x), 2 * x)\n"
    )
    tests = Tests(source=source, module="double")
    assert verdict("def f(x): return 0", tests) == Verdict(0, 1, "test_all: 0 != 2")
    assert verdict(RIGHT, tests) == Verdict(1, 1)


def test_code_that_is_judged_has_two_pipes_and_nothing_else() -> None:
    code = """
import os
def fails(what, *arguments):
    try: what(*arguments)
    except OSError: return True
def f(x):
    return all([fails(os.write, 3, b"x"), fails(os.read, 4, 1), *(fails(os.fstat, n) for n in range(5, 2000))])
"""
    assert verdict(code, Tests(("assert f(1) is True",))) == Verdict(1, 1)


class TestTheJail:
    def test_no_lock_on_files_that_others_see(self) -> None:
        program = """
import errno, fcntl, os
file = os.open(os.__file__, os.O_RDONLY)
attempts = [lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)]
attempts += [lambda command=command: fcntl.fcntl(file, command, 1) for command in (8, 10, 15, 1024, 1026)]
for attempt in attempts:  # owner and signal of a descriptor, leases, notices
    try: attempt(); print("open")
    except OSError as error: print(errno.errorcode[error.errno])
"""
        assert run(program).output.split() == [b"EPERM"] * 6  # by the filter, not for another reason

    def test_who_stops_himself_ends_at_the_time_limit(self) -> None:
        stop = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
        assert run(stop, limits=Limits(seconds=0.5)).status == "time"
        assert "not over after 0.5 s" in try_code(stop, ASSERTS, Limits(seconds=0.5)).reason

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the order of clone's arguments is that of x86-64")
    def test_a_child_that_gives_itself_another_parent_ends_with_the_code(self) -> None:
        program = f"""
import ctypes, os
child = ctypes.CDLL(None).syscall(56, 0x8000 | 17, 0, 0, 0, 0)  # CLONE_PARENT: a child of process 1
if child == 0:
    if os.fork() == 0:
        {FOREVER.replace(chr(10), chr(10) + "        ")}
    os._exit(7)
print("begun" if child > 0 else "refused")
"""
        found = run(program, limits=Limits(seconds=60, processes=8))
        assert (found.status, found.exit_code, found.output) == ("ended", 0, b"begun\n")
        assert found.seconds < 50

    def test_output_in_single_bytes_costs_us_no_more_than_its_bytes(self) -> None:
        before = time.process_time()
        found = run("import os\nfor _ in range(20_000): os.write(1, b'x')")
        assert found.output == b"x" * 20_000 and time.process_time() - before < 2  # measured: 0.1

    def test_who_was_stopped_before_he_began_was_not_refused(self) -> None:
        words = b'{"end": "stopped", "started": false, "cpu": 0.0}\n'
        jail = Jail(Job(""), -1, 0.0, {0: bytearray(words), 1: bytearray(), 2: bytearray()})
        assert outcome(jail).status == "stopped"

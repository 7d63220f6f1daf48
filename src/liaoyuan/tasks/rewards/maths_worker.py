"""The program that compares two mathematical expressions with math-verify, in a process of its own.

sympy can take minutes or gigabytes over an expression that a model wrote; then this process is what ends. It is run
as a file and imports nothing of this package. Lines of JSON: {"gold", "answer", "question": formulas in it} in (an
equation as a pair of its sides), {"equal": true, false or null, "why"} out; null is for a right answer that cannot be
read. Only the LaTeX grammar is used: the reader of plain expressions would hand text to Python's `eval`.
"""

import functools
import json
import logging
import resource
import signal
import sys
from typing import Any

DECIMALS = 12  # to which a decimal that stands for an exact value must be right
MEMORY_BYTES = 2 * 2**30


class OutOfTime(BaseException):
    """A call took too long; no `except Exception` on the way may swallow this."""


def main(seconds: float) -> None:
    import math_verify  # noqa: F401  (here, so that who wants only this file's path need not have it imported)

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _stop)
    _compare("x+1", "1+x", [])  # what is done once is not charged to the first answer
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_answer(question, seconds)), flush=True)


def _answer(question: dict[str, Any], seconds: float) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _compare(question["gold"], question["answer"], question["question"])
    except OutOfTime:
        return {"equal": None, "why": f"it took over {seconds:g} s"}
    except (MemoryError, RecursionError) as error:
        return {"equal": None, "why": type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compare(gold: Any, answer: Any, formulas: list[str]) -> dict[str, Any]:
    from math_verify import verify

    if isinstance(gold, list):
        return _compare_equations(gold, answer)
    wanted = _read(gold)
    if not wanted:
        return {"equal": None, "why": "the right answer cannot be read"}
    found = _read(answer)
    if not found:
        return {"equal": False, "why": "the answer cannot be read"}
    try:
        equal = verify(list(wanted), list(found), float_rounding=DECIMALS, timeout_seconds=None, raise_on_error=True)
        if equal and any(_is_copy(found, wanted, _read(formula)) for formula in formulas):
            return {"equal": False, "why": "it is what the question says"}
    except Exception as error:
        return {"equal": False, "why": f"it cannot be compared ({type(error).__name__})"}
    return {"equal": equal, "why": ""}


def _compare_equations(gold: list[str], answer: list[str]) -> dict[str, Any]:
    """Two equations say the same if the difference of one's sides is a constant, but not 0, times the other's."""
    from sympy import simplify

    (left, right), (left_found, right_found) = ([_read(side) for side in sides] for sides in (gold, answer))
    if not (left and right):
        return {"equal": None, "why": "the right equation cannot be read"}
    if not (left_found and right_found):
        return {"equal": False, "why": "the equation cannot be read"}
    try:
        ratio = simplify((left[0] - right[0]) / (left_found[0] - right_found[0]))
    except Exception as error:
        return {"equal": False, "why": f"it cannot be compared ({type(error).__name__})"}
    return {"equal": bool(ratio.is_number and ratio.is_finite and not ratio.is_zero), "why": ""}


def _is_copy(found: tuple[Any, ...], wanted: tuple[Any, ...], formula: tuple[Any, ...]) -> bool:
    """Whether an answer is a formula of the question, as it is written or with its terms in order, and not the gold."""
    if found == formula and found != wanted:
        return True
    done, theirs, right = ([one.doit() for one in some if hasattr(one, "doit")] for some in (found, formula, wanted))
    return bool(done) and done == theirs and done != right


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Any, ...]:
    """Return what the LaTeX says, as sympy has it; nothing where it cannot be read (the text itself is no reading)."""
    from math_verify import LatexExtractionConfig, parse

    try:
        found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    except Exception:
        return ()
    return tuple(found)


def _stop(number: int, frame: object) -> None:
    raise OutOfTime


if __name__ == "__main__":
    main(float(sys.argv[1]))

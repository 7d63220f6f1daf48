"""How often the reward of unit tests is wrong: over MBPP's training part and Exercism's Python track.

False negatives: the sets' own solutions that it does not call right. False positives: wrong programs that it calls
right: each solution changed in one place, in fifteen ways, and programs that cheat. A changed program that passes may
be no worse, or its tests see no difference: so all are run a second time in the ordinary way, code and tests in one
process (of a jail), and only what is judged otherwise there is a mistake of the reward. For the cheats the ordinary
way shows what they do to a reward that has no jail for the tests.

    python benchmarks/code_reward.py DATA/code_mbpp_train.jsonl.zst DATA/code_exercism_py.jsonl.zst --json rates.json
"""

import argparse
import ast
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code_mutations import cheats, mutants
from liaoyuan.data import read_examples
from liaoyuan.safety import Limits, Tests, require, run
from liaoyuan.tasks import Problem, Rollout, Score
from liaoyuan.tasks.rewards.code import CodeConfig, UnitTests, code_of, read_tests

FENCE = "`" * 9  # longer than any in a program


@dataclass(frozen=True)
class Case:
    """A program, the problem that it is for, its kind, and in which way it was made."""

    problem: Problem
    code: str
    kind: str  # solution, mutant or cheat
    way: str = ""


def main() -> None:
    options = _options()
    require()
    seconds = 8.0 * options.cpu_seconds  # a busy machine makes nothing wrong
    reward = UnitTests(CodeConfig(cpu_seconds=options.cpu_seconds, seconds=seconds, at_once=options.at_once))
    results = {}
    for path in options.data:
        problems = read_problems(path)[: options.limit]
        began = time.perf_counter()
        results[path.name] = measure(reward, problems, options)
        results[path.name]["seconds"] = time.perf_counter() - began
        print(text(path.name, results[path.name]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def read_problems(path: Path) -> list[Problem]:
    """Read the rows of either set; the solution is the thought."""
    return [
        Problem("code", asked.content, record.answer, code_of(solved.content), 0, record.id)
        for record in read_examples(path)[0]
        for asked, solved in [record.messages]
    ]


def measure(reward: UnitTests, problems: list[Problem], options: Any) -> dict[str, Any]:
    solutions = [Case(problem, problem.thought, "solution") for problem in problems]
    scores = judge(reward, solutions)
    broken = {
        case.problem.key: score.reason for case, score in zip(solutions, scores, strict=True) if score.value is None
    }
    missed = {case.problem.key: score.reason for case, score in zip(solutions, scores, strict=True) if score.value == 0}
    good = [problem for problem, score in zip(problems, scores, strict=True) if score.value == 1]
    wrong = [
        case for place, problem in enumerate(good) for case in wrong_programs(problem, place, options.cheats_every)
    ]
    verdicts = judge(reward, wrong)
    passed = [case for case, score in zip(wrong, verdicts, strict=True) if score.value == 1]
    apart, ordinary = set_of(passed), set_of(passes_in_one_process(wrong, options.at_once))
    return {
        "problems": len(problems),
        "broken": broken,
        "missed": missed,
        "none": sum(score.value is None for score in verdicts),
        "mutants": Counter(case.way for case in wrong if case.kind == "mutant"),
        "mutants_passed": Counter(case.way for case in passed if case.kind == "mutant"),
        "mutants_wrongly": [name_of(case) for case in passed if case.kind == "mutant" and id(case) not in ordinary],
        "mutants_refused": [
            name_of(case) for case in wrong if case.kind == "mutant" and id(case) in ordinary and id(case) not in apart
        ],
        "cheats": Counter(case.way for case in wrong if case.kind == "cheat"),
        "cheats_passed": Counter(case.way for case in passed if case.kind == "cheat"),
        "cheats_in_one_process": Counter(case.way for case in wrong if case.kind == "cheat" and id(case) in ordinary),
        "cheats_that_passed": [name_of(case) for case in passed if case.kind == "cheat"],
    }


def judge(reward: UnitTests, cases: list[Case]) -> list[Score]:
    """Score programs, a few hundred at a time, with a line of progress."""
    scores: list[Score] = []
    for start in range(0, len(cases), 200):
        part = cases[start : start + 200]
        texts = [f"{FENCE}python\n{case.code}\n{FENCE}" for case in part]
        scores += reward.score_all([Rollout(case.problem, "", text) for case, text in zip(part, texts, strict=True)])
        print(f"{len(scores)} of {len(cases)} programs", file=sys.stderr)
    return scores


def wrong_programs(problem: Problem, place: int, cheats_every: int) -> Iterator[Case]:
    for way, code in mutants(problem.thought, place):
        yield Case(problem, code, "mutant", way)
    if place % cheats_every == 0:
        tree = ast.parse(problem.thought)
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for way, code in cheats(tuple(names)):
            yield Case(problem, code, "cheat", way)


def passes_in_one_process(cases: list[Case], at_once: int) -> Iterator[Case]:
    """Yield the programs that pass where code and tests are one process, whose exit code decides."""
    with ThreadPoolExecutor(at_once) as pool:
        for case, passed in zip(cases, pool.map(_passes, cases), strict=True):
            if passed:
                yield case


def _passes(case: Case) -> bool:
    tests = read_tests(case.problem.answer) or Tests()
    limits = Limits(seconds=40, cpu_seconds=5)
    if tests.source:
        files = {f"{tests.module}.py": case.code.encode(), "tests.py": tests.source.encode()}
        return run("import unittest\nunittest.main('tests')", files, limits).is_well
    return run("\n".join([case.code, tests.setup, *tests.tests]), limits=limits).is_well


def set_of(cases: Iterable[Case]) -> set[int]:
    return {id(case) for case in cases}


def name_of(case: Case) -> str:
    return f"{case.problem.key}: {case.way}"


def text(name: str, found: dict[str, Any]) -> str:
    """Return the rates of a set as tables."""
    judged = found["problems"] - len(found["broken"])
    wrong, passed = sum(found["mutants"].values()), sum(found["mutants_passed"].values())
    lines = [
        f"\n## {name}: {found['problems']} problems, {found['seconds']:.0f} s",
        f"solutions judged right: {judged - len(found['missed'])} of {judged}",
        f"tests that cannot run: {len(found['broken'])}",
        *(f"  {key}: {reason}" for kind in ("missed", "broken") for key, reason in found[kind].items()),
        f"programs changed in one place: {wrong}; pass their tests: {passed} ({passed / max(1, wrong):.1%}); "
        f"of these fail where code and tests are one process: {len(found['mutants_wrongly'])}",
        *(f"  {row}" for row in found["mutants_wrongly"]),
        f"fail their tests, but pass where code and tests are one process: {len(found['mutants_refused'])}",
        *(f"  {row}" for row in found["mutants_refused"]),
        "",
        "| changed | programs | pass |",
        "|---|---|---|",
        *(f"| {way} | {count} | {found['mutants_passed'][way]} |" for way, count in found["mutants"].items()),
        "",
        "| cheat | programs | pass in one process | pass apart |",
        "|---|---|---|---|",
    ]
    for way, count in found["cheats"].items():
        lines.append(f"| {way} | {count} | {found['cheats_in_one_process'][way]} | {found['cheats_passed'][way]} |")
    sums = [sum(found[name].values()) for name in ("cheats", "cheats_in_one_process", "cheats_passed")]
    lines.append(f"| all | {sums[0]} | {sums[1]} | {sums[2]} |")
    return "\n".join([*lines, *(f"  {row}" for row in found["cheats_that_passed"])])


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, help="problems of each file")
    parser.add_argument("--cheats-every", type=int, default=5, help="problems between two that all cheats are tried on")
    parser.add_argument("--cpu-seconds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""The public server test suites of llama.cpp and vLLM, run against our server.

    python benchmarks/conformance.py [--suite llama.cpp] [--folder runs/conformance] [--source PACKAGE.tar.gz]

Fetches the suites' published source packages with pip, replaces what starts their own servers by ours (the model is
stories260k where a suite is written for it, else a random one of the Qwen3 family), and prints for each suite: passed,
fails for a reason that `conformance_reasons.toml` states, asks for another kind of server, not runnable without its
model, unexpected. Writes `conformance.json` in the folder. Nothing of the suites is kept in this repository. Exit
status 1: something unexpected.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STORIES = HERE.parents[1] / "shared/models/stories260k"
# With these words a plugin skips what cannot be asked of our models, and llama.cpp's suite what needs large ones.
NO_MODEL = ("needs the model", "slow test")
OWN_PARTS = "about a part of"  # and with these what is not about a server


@dataclass(frozen=True)
class Suite:
    """A suite in a source package.

    package: pip's name and version. kept: what of it is unpacked. root: where pytest runs. plugin: what puts our server
    in place. tests: files or folders. left_out: of what is unpacked. packages: what else the tests import.
    """

    package: str
    kept: tuple[str, ...]
    root: str
    plugin: str
    tests: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


OPENAI, TOOLS, SERVE = "tests/entrypoints/openai", "tests/tool_use", "tests/entrypoints/serve"
CHAT = OPENAI + "/chat_completion"
SUITES = {
    "llama.cpp": Suite(
        "llama-cpp-python==0.3.36",
        ("vendor/llama.cpp/tools/server/tests/", "vendor/llama.cpp/models/templates/"),
        "vendor/llama.cpp/tools/server/tests",
        "conformance_llama",
        ("unit",),
    ),
    "vLLM": Suite(
        "vllm==0.33.0",
        ("tests/",),
        ".",
        "conformance_vllm",
        (
            "tests/entrypoints/anthropic/test_messages.py",
            f"{OPENAI}/completion/test_completion.py",
            f"{OPENAI}/completion/test_prompt_validation.py",
            f"{OPENAI}/completion/test_token_in_token_out.py",
            f"{CHAT}/test_chat.py",
            f"{CHAT}/test_chat_echo.py",
            f"{CHAT}/test_chat_logit_bias_validation.py",
            f"{CHAT}/test_completion_with_function_calling.py",
            f"{CHAT}/test_enable_force_include_usage.py",
            f"{CHAT}/test_chat_completion.py",
            f"{CHAT}/test_thinking_token_budget.py",
            f"{CHAT}/test_include_reasoning.py",
            f"{CHAT}/test_logprob_token_ids.py",
            f"{OPENAI}/test_return_token_ids.py",
            f"{OPENAI}/test_return_tokens_as_ids.py",
            f"{OPENAI}/test_chunked_prompt.py",
            f"{OPENAI}/test_openai_schema.py",
            f"{OPENAI}/responses/test_simple.py",
            f"{OPENAI}/models/test_models.py",
            f"{TOOLS}/test_chat_completions.py",
            f"{TOOLS}/test_tool_calls.py",
            f"{TOOLS}/test_parallel_tool_calls.py",
            f"{SERVE}/tokenize/test_tokenization.py",
            f"{SERVE}/instrumentator/test_basic.py",
            "tests/entrypoints/pooling/embed/test_online.py",
            "tests/entrypoints/pooling/embed/test_online_dimensions.py",
            "tests/entrypoints/pooling/scoring/test_bi_encoder_online.py",
        ),
        left_out=("tests/conftest.py",),  # it imports all of vLLM
        packages=("pytest-asyncio", "pybase64"),
    ),
}


def main() -> None:
    """Run the suites that are asked for; print their counts."""
    options = _options()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reasons = tomllib.loads((HERE / "conformance_reasons.toml").read_text())
    results = {}
    for name in [options.suite] if options.suite else SUITES:
        suite = SUITES[name]
        source = options.source or _fetch(suite, folder / "sources")
        root = _unpack(suite, source, folder / name)
        results[name] = _judge(_run(suite, root, folder, options.tests), reasons.get(name, {}))
    (folder / "conformance.json").write_text(json.dumps(results, indent=2) + "\n")
    _print(results)
    sys.exit(any(result["unexpected"] for result in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="only this one")
    parser.add_argument("--folder", type=Path, default=Path("runs/conformance"))
    parser.add_argument("-k", dest="tests", default="", help="only tests of such names, as pytest has it")
    parser.add_argument("--source", type=Path, help="the suite's source package, if it is here already")
    return parser.parse_args()


def _fetch(suite: Suite, folder: Path) -> Path:
    """Return the source package, fetched by pip.

    pip asks a package for its version by running its build, which would need all that it is built with. The build
    requirements that matter are put on its path, and nothing is compiled.
    """
    name, version = suite.package.split("==")
    wanted = folder / f"{name.replace('-', '_')}-{version}.tar.gz"
    if wanted.exists():
        return wanted
    tools = folder / "tools"
    _pip("install", "--target", str(tools), "setuptools", "setuptools-scm", "setuptools-rust", "scikit-build-core")
    build = {"PYTHONPATH": str(tools), "VLLM_VERSION_OVERRIDE": version, "VLLM_TARGET_DEVICE": "empty"}
    quick = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    _pip("download", *quick, "--dest", str(folder), suite.package, **build)
    return wanted


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def _unpack(suite: Suite, source: Path, target: Path) -> Path:
    """Unpack what is needed of a source package; return the folder where its tests run."""

    def wanted(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        inside = member.name.partition("/")[2]
        if inside in suite.left_out or not inside.startswith(suite.kept):
            return None
        return tarfile.data_filter(member.replace(name=inside, deep=False), path)

    with tarfile.open(source) as archive:
        archive.extractall(target, filter=wanted)
    return target / suite.root


def _run(suite: Suite, root: Path, folder: Path, tests: str) -> list[dict[str, str]]:
    """Run the tests (whose names fit `tests`, if it is given); return the outcome of each."""
    packages, outcomes = folder / "packages", folder / f"{suite.plugin}.jsonl"
    if suite.packages:
        _pip("install", "--no-deps", "--upgrade", "--target", str(packages), *suite.packages)
    outcomes.unlink(missing_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = strict\n")
    plugins = ["-p", "conformance_outcomes", "-p", suite.plugin, "-p", "no:cacheprovider"]
    settings = ["-c", str(folder / "pytest.ini"), "--rootdir", ".", "--continue-on-collection-errors", "--tb=short"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE), str(packages)]),
        "CONFORMANCE_STORIES": str(STORIES),
        "CONFORMANCE_FOLDER": str(folder),
        "CONFORMANCE_OUTCOMES": str(outcomes),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", tests, *settings, *plugins, *suite.tests]
    with (folder / f"{suite.plugin}.log").open("w") as log:
        subprocess.run(command, cwd=root, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)
    return [json.loads(line) for line in outcomes.read_text().splitlines()]


def _judge(outcomes: list[dict[str, str]], reasons: dict[str, dict[str, str]]) -> dict[str, object]:
    """Sort outcomes; a pattern of a test's name has a reason, and what fails without one is unexpected."""
    counts: Counter[str] = Counter()
    unexpected, used = [], set()
    for outcome in outcomes:
        name = outcome["test"]
        found = [(kind, pattern) for kind in reasons for pattern in reasons[kind] if fnmatch.fnmatchcase(name, pattern)]
        if outcome["outcome"] == "passed":
            counts["passed"] += 1
        elif OWN_PARTS in outcome["why"]:
            counts["not about a server"] += 1
        elif outcome["outcome"] == "skipped" and (not found or any(words in outcome["why"] for words in NO_MODEL)):
            counts["model"] += 1
        elif found:
            used.add(found[0])
            counts[found[0][0]] += 1
        else:
            unexpected.append(f"{name}: {outcome['why'].splitlines()[0] if outcome['why'] else ''}")
    stale = [pattern for kind in reasons for pattern in reasons[kind] if (kind, pattern) not in used]
    return {"counts": dict(counts), "unexpected": unexpected, "reasons that nothing needs": stale}


def _print(results: dict[str, dict[str, object]]) -> None:
    for name, result in results.items():
        counts = result["counts"]
        assert isinstance(counts, dict) and isinstance(result["unexpected"], list)
        passed, reason, other, model = (counts.get(kind, 0) for kind in ("passed", "reason", "other", "model"))
        among, among_all = (100 * reason / max(1, passed + reason + more) for more in (0, other + model))
        print(
            f"{name}: {passed} passed, {reason} fail for a stated reason, {other} ask for another kind of server, "
            f"{model} not runnable without their model, {len(result['unexpected'])} unexpected; a stated reason have "
            f"{among:.1f}% of those that could pass here, {among_all:.1f}% of all "
            f"({counts.get('not about a server', 0)} are not about a server)"
        )
        for line in result["unexpected"]:
            print("  UNEXPECTED", line[:240])
        for pattern in result["reasons that nothing needs"]:  # type: ignore[attr-defined]
            print("  no longer needed:", pattern)


if __name__ == "__main__":
    main()

"""Every way of learning from checked answers or from a teacher, from one start, on one task, for the same CPU-seconds.

A short trial of each way says what a step costs; its steps follow from the budget, which has rollouts, rewards, the
teacher and the critic in it, but no validation. Of each run the best checkpoint on validation is measured on test
problems. Settings are the verbs' own but for what the table names; learning rates are not tuned way by way.

    python benchmarks/methods.py --start runs/quickstart/seed-0/sft/best --teacher runs/quickstart/seed-0/rl/1/best

It goes on from what is in `--out`; about 25 CPU-seconds a way.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from liaoyuan.cli.process import tune_process

SETTINGS = tune_process()

import torch  # noqa: E402  (after the allocator's settings)

from liaoyuan.checkpoint import load_model  # noqa: E402
from liaoyuan.data import TokenisedRecord, Tokenizer, read_records, tokenise  # noqa: E402
from liaoyuan.device import cpu_name  # noqa: E402
from liaoyuan.evaluation import bootstrap  # noqa: E402
from liaoyuan.models import Decoder  # noqa: E402
from liaoyuan.rundir import read_json, write_json  # noqa: E402
from liaoyuan.tasks import Right, find_task, spread  # noqa: E402
from liaoyuan.training import TrainConfig  # noqa: E402
from liaoyuan.tuning.finetune import finetune  # noqa: E402
from liaoyuan.tuning.lora import LoraConfig  # noqa: E402
from liaoyuan.tuning.rl_run import RlConfig, run_rl  # noqa: E402
from liaoyuan.tuning.sample_run import RECORDS, SampleConfig, run_sample  # noqa: E402
from liaoyuan.tuning.start import Start  # noqa: E402
from liaoyuan.tuning.validation import Best  # noqa: E402
from rl_answers import answers_of, cell  # noqa: E402

MAX_TOKENS = 48
TRIAL = 4  # steps that say what one costs
VALIDATIONS = 4  # in a run
SAMPLING = 1 / 3  # share of the budget in which answers are drawn that are fine-tuned on
SFT = {"learning_rate": 8e-3, "optimiser": "muon", "weight_decay": 0.3, "batch_tokens": 1024}  # as the study's controls
REWARDED: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "Dr. GRPO": {"advantage": "dr_grpo", "aggregation": "constant"},
    "DAPO: further draws, long answers cost": {"further_draws": 2, "overlong_tokens": 8},
    "RLOO": {"advantage": "rloo"},
    "REINFORCE++": {"advantage": "reinforce_pp"},
    "GSPO": {"ratio": "sequence", "aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "CISPO": {"ratio": "cispo"},
}
PPO: dict[str, Any] = {"advantage": "gae", "group": 4}  # it learns from every answer, so fewer are drawn
ADAPTED: dict[str, dict[str, Any]] = {  # GRPO of adapters alone
    "GRPO, LoRA": {"method": "lora"},
    "GRPO, rsLoRA": {"method": "rslora"},
    "GRPO, DoRA": {"method": "dora"},
    "GRPO, LoRA on int8": {"method": "lora", "lora": {"base": "int8"}},
    "GRPO, LoRA on int4": {"method": "lora", "lora": {"base": "int4"}},
}
TAUGHT: dict[str, dict[str, Any]] = {
    "on-policy distillation": {},
    "on-policy distillation, whole distributions": {"teacher_loss": "whole"},
    "on-policy distillation beside GRPO's reward": {"advantage": "grpo", "group": 8},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread; {options.task}, levels {options.levels}, {options.cpu_seconds} CPU-seconds each")
    out, rows = Path(options.out), {}
    given = {"teacher": options.teacher}
    ways: dict[str, Any] = {"the start": lambda folder: {}}
    ways |= {name: lambda folder, own=own: reinforced(options, folder, own) for name, own in REWARDED.items()}
    ways |= {name: lambda folder, how=how: reinforced(options, folder, {}, **how) for name, how in ADAPTED.items()}
    ways |= {name: lambda folder, own=own: reinforced(options, folder, own, **given) for name, own in TAUGHT.items()}
    ways["own right answers, then SFT"] = lambda folder: rejected(options, folder, options.start)
    ways["the teacher's right answers, then SFT"] = lambda folder: rejected(options, folder, options.teacher)
    ways["the same as text, every token learned (continued pretraining)"] = lambda folder: rejected(
        options, folder, options.teacher, as_text=True
    )
    ways["PPO with a critic"] = lambda folder: reinforced(options, folder, PPO)
    for name in options.ways or ways:
        folder, way = out / "".join(letter if letter.isalnum() else "-" for letter in name), ways[name]
        if not (folder / "way.json").exists():
            found = way(folder)
            start = Start(Path(options.start), found.get("method", "full"), LoraConfig(**found.get("lora", {})))
            model = start.trained(Path(found["model"])) if found else start.base()
            write_json(folder / "way.json", found | measured(options, model))
        rows[name] = read_json(folder / "way.json")
        print(line(name, rows[name]), flush=True)
    if options.json:
        write_json(Path(options.json), {"settings": vars(options), "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="folder of the model to begin with")
    parser.add_argument("--teacher", required=True, help="folder of a better model of the same vocabulary")
    parser.add_argument("--ways", nargs="+", default=[], help="as the table names them, if not all")
    parser.add_argument("--task", default="addition")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--cpu-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-problems", type=int, default=500)
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--json", default="")
    return parser.parse_args()


def reinforced(options: argparse.Namespace, folder: Path, own: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Run `tune rl` (or `distill`) for the budget, after a trial of it."""

    def run(name: str, steps: int) -> float:
        rl = {"levels": options.levels, "steps": steps, "seed": options.seed, "max_tokens": MAX_TOKENS, **own}
        rl |= {"validate_every": max(1, steps // VALIDATIONS), "measure_kl": False}
        values = {"model": options.start, "task": options.task, "rl": rl, "test_problems": 0, **given}
        return float(run_rl(RlConfig.model_validate(values), folder / name)["cpu_seconds"])

    steps = max(1, round(options.cpu_seconds / (run("trial", TRIAL) / TRIAL)))
    result = folder / "run" / Start(Path(options.start), given.get("method", "full")).name
    return {"cpu_seconds": run("run", steps), "steps": steps, "model": str(result), **given}


def rejected(options: argparse.Namespace, folder: Path, writer: str, as_text: bool = False) -> dict[str, Any]:
    """Draw right answers of `writer` for a share of the budget, and fine-tune the start on them for the rest.

    as_text: of problem and answer every token is learned.
    """

    def draw(name: str, problems: int) -> float:
        values = {"model": writer, "task": options.task, "levels": options.levels, "problems": problems}
        values |= {"max_tokens": MAX_TOKENS, "seed": options.seed}
        return float(run_sample(SampleConfig.model_validate(values), folder / name)["cpu_seconds"])

    cost = draw("trial-draw", 32 * TRIAL) / (32 * TRIAL)
    spent = draw("drawn", round(SAMPLING * options.cpu_seconds / cost))
    price = tuned(options, folder / "trial", folder / "drawn", TRIAL, as_text) / TRIAL
    steps = max(1, round((options.cpu_seconds - spent) / price))
    spent += tuned(options, folder / "run", folder / "drawn", steps, as_text)
    return {"cpu_seconds": spent, "steps": steps, "model": str(folder / "run" / "best")}


def tuned(options: argparse.Namespace, folder: Path, drawn: Path, steps: int, as_text: bool) -> float:
    """Fine-tune the start on what was drawn; return the CPU-seconds."""
    tokenizer, task = Tokenizer.load(Path(options.start)), find_task(options.task)
    problems = spread(task, 7, options.levels, 200, "validation")
    best = Best(tokenizer, Start(Path(options.start)), Right(task), problems, folder, MAX_TOKENS)
    plan = {"steps": steps, "warmup_steps": min(20, steps // 10), "evaluate_every": max(1, steps // VALIDATIONS)}
    records = tokenise(tokenizer, read_records(drawn / RECORDS))
    if as_text:
        records = [TokenisedRecord(one.tokens, (1.0,) * len(one.tokens)) for one in records]
    config = TrainConfig.model_validate({**SFT, **plan, "seed": options.seed})
    return finetune(load_model(Path(options.start)), records, config, folder, evaluate=best).cpu_seconds


def measured(options: argparse.Namespace, model: Decoder) -> dict[str, Any]:
    """Return the accuracies of a model on test problems, with intervals over the problems."""
    begin = time.process_time()
    answers = answers_of(model, Tokenizer.load(Path(options.start)), vars(options), MAX_TOKENS)
    outcomes = {"greedy": answers.greedy, "sampled": answers.sampled_mean, "pass@4": answers.pass_at_k}
    found = {name: bootstrap(values.astype(float)).to_dict() for name, values in outcomes.items()}
    return found | {"measuring_cpu_seconds": time.process_time() - begin}


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    cells = [cell(row[key]) for key in ("greedy", "sampled", "pass@4")]
    spent = [str(row.get("steps", "")), f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else ""]
    return "| " + " | ".join([name, *cells, *spent]) + " |"


if __name__ == "__main__":
    main()

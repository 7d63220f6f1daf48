"""TRL's GRPO for `rl_speed.py --peers FOLDER`, run by a python of its own; it imports nothing of the package.

    python benchmarks/rl_peer.py prepare FOLDER      # once: FOLDER/trl
    FOLDER/trl/bin/python benchmarks/rl_peer.py run TASK.json

It waits for a line before each step, takes the step, and answers {"tokens", "seconds", "cpu_seconds"}.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INSTALL = ("trl==1.16.0", "torch==2.13.0", "accelerate", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "run"))
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    if options.verb == "run":
        run(json.loads(options.path.read_text()))
        return
    python = options.path / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.path / "trl")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", *INSTALL], check=True)


def run(task: dict[str, Any]) -> None:
    """Take steps of GRPO as `task` says: model, prompts, group, problems, max_tokens, threads, dtype, way."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed by others is no answer
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(task["threads"])
    tokens = 0

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        return [float(place % 2) for place in range(len(completion_ids))]

    class OnDemand(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal tokens
            sys.stdin.readline()
            tokens, self.began = 0, (time.perf_counter(), time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}), file=answers, flush=True)

    rollouts = task["problems"] * task["group"]
    config = GRPOConfig(
        output_dir=str(Path(task["folder"]) / "trl"),
        use_cpu=True,
        bf16=task["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=task["rows"],
        gradient_accumulation_steps=rollouts // task["rows"],
        num_generations=task["group"],
        max_completion_length=task["max_tokens"],
        use_transformers_continuous_batching=task["way"] == "continuous",
        learning_rate=1e-5,
        max_steps=task["steps"],
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in task["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[OnDemand()],
    )
    trainer.train()


if __name__ == "__main__":
    main()

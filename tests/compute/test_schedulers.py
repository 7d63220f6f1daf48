"""Job files: the Slurm script runs, and the official client of Kubernetes finds nothing wrong with the manifest."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient
from typer.testing import CliRunner

from liaoyuan.cli.main import app
from liaoyuan.compute import JobRequest, kubernetes_manifest, slurm_script
from liaoyuan.rundir import read_metrics
from tests.compute.job import PATIENCE

SRUN = """#!/bin/bash
# Stand-in for srun: starts the command once for each node that the script asks for, and waits for all of them.
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$SCRIPT")
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit ${failed:-0}
"""
JOB = JobRequest(
    "liaoyuan-run", ("launch", "--nnodes", "4", "train", "a b.toml"), "/shared/my runs", nodes=4, processes=8
)


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["launch", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_slurm_script_runs_two_processes_on_each_of_two_nodes(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin"
    program.mkdir()
    for name, text in {"srun": SRUN, "liaoyuan": f'#!/bin/sh\nexec {sys.executable} -m liaoyuan "$@"\n'}.items():
        (program / name).write_text(text)
        (program / name).chmod(0o755)
    options = ["--nnodes", "2", "--nproc", "2", "--slurm", "job.sh"]
    said = run(*options, "train", str(run_file), "--out", "runs/small", "--set", "train.steps=6")
    assert said == "sbatch job.sh\n"
    environment = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "SCRIPT": "job.sh", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("launch: 4 processes on 2 hosts") == 2
    assert len(read_metrics(tmp_path / "runs" / "small" / "metrics.jsonl")) == 6
    assert (tmp_path / "runs" / "small" / "model" / "model.safetensors").exists()


def test_slurm_is_asked_for_cards_and_not_to_end_the_job() -> None:
    lines = slurm_script(JobRequest(**{**vars(JOB), "accelerator": "gpu"})).splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--no-kill", "--signal=TERM@300"):
        assert f"#SBATCH {option}" in lines
    assert "cd '/shared/my runs'" in lines
    assert lines[-1].strip() == "liaoyuan launch --nnodes 4 train 'a b.toml'"
    assert "--kill-on-bad-exit=0" in lines[-2]


@pytest.mark.parametrize("accelerator", [None, "nvidia.com/gpu"])
def test_the_official_client_reads_the_manifest_without_loss(accelerator: str | None) -> None:
    manifest = yaml.safe_load(kubernetes_manifest(JobRequest(**{**vars(JOB), "accelerator": accelerator})))
    client = ApiClient()
    job: Any = client.deserialize(json.dumps(manifest), "V1Job", "application/json")  # raises on a wrong type
    assert client.sanitize_for_serialization(job) == manifest  # a field that it does not know would be lost
    container = job.spec.template.spec.containers[0]
    assert container.args == list(JOB.command) and job.spec.completions == job.spec.parallelism == 4
    assert (container.resources.limits or {}) == ({accelerator: "8"} if accelerator else {})


def test_the_verb_writes_a_manifest_whose_pods_name_their_addresses(run_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    options = ["--nnodes", "2:4", "--nproc", "8", "--hang-timeout", "900", "--accelerator", "nvidia.com/gpu"]
    said = run(*options, "--kubernetes", str(path), "train", str(run_file), "--set", "train.batch_tokens=4096")
    assert said == f"kubectl apply -f {path}\n"
    job = yaml.safe_load(path.read_text())
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[:3] == ["launch", "--address", "$(POD_IP)"]
    assert "--accelerator" not in args and "--kubernetes" not in args
    assert args[3:9] == ["--nproc", "8", "--nnodes", "2:4", "--hang-timeout", "900.0"]
    assert job["spec"]["completions"] == 4 and job["metadata"]["name"] == "liaoyuan-train"

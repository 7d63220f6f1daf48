"""What cannot work is refused at the door, in one sentence, before any process is started."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from liaoyuan.cli.launch import parse_range
from liaoyuan.cli.main import app
from liaoyuan.errors import LiaoyuanError
from tests.compute.job import Job


def launch(*words: str) -> None:
    done = CliRunner().invoke(app, ["launch", *words], catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        raise LiaoyuanError(done.output)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian", "run.toml"], "There is no verb 'trian' to launch, did you mean 'train'"),
        (["tune", "sftt"], "There is no verb 'tune sftt' to launch, did you mean 'sft'"),
        (["tune"], "There is no verb 'tune' to launch"),
        (["serve"], "'serve' runs in one process; what can be launched is: train, tune sft, tune dpo, tune reward"),
        (["train", "missing.toml"], "The run file missing.toml does not exist"),
        (["train", "--stepz", "3"], "No such option: --stepz"),
        (["--nproc", "0", "train"], "--nproc 0 is wrong: give a number above 0, or a range such as 2:4"),
        (["--nproc", "4:2", "train"], "--nproc 4:2 is wrong"),
        (["--nnodes", "many", "train"], "--nnodes many is wrong"),
        (["--rendezvous", "host:29400", "train"], "--rendezvous host:29400 is a host and port; give a folder"),
    ],
)
def test_a_wrong_command_line(words: list[str], sentence: str) -> None:
    with pytest.raises(LiaoyuanError) as error:
        launch(*words)
    assert sentence in str(error.value)


def test_ranges() -> None:
    assert parse_range("--nproc", "4") == (4, 4)
    assert parse_range("--nproc", "2:4") == (2, 4)


def test_a_number_of_processes_that_does_not_divide_the_batch_names_the_nearest(run_file: Path) -> None:
    with pytest.raises(LiaoyuanError, match=r"cannot be divided over 3 processes; 2 or 4 would do"):
        launch("--nproc", "3", "train", str(run_file))
    with pytest.raises(LiaoyuanError, match=r"cannot be divided over 6 processes; 4 would do"):  # no host is waited for
        launch("--nproc", "3", "--nnodes", "2", "--join-timeout", "1", "train", str(run_file))


def test_a_rendezvous_that_cannot_be_reached(run_file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    began = time.monotonic()
    with pytest.raises(LiaoyuanError, match=r"The rendezvous .*file/folder is unreachable: Not a directory"):
        launch("--nnodes", "2", "--nproc", "1", "--rendezvous", str(blocked / "folder"), "train", str(run_file))
    assert time.monotonic() - began < 10


def test_hosts_that_do_not_come(run_file: Path, tmp_path: Path) -> None:
    options = ["--nnodes", "2", "--nproc", "1", "--join-timeout", "1"]
    with pytest.raises(LiaoyuanError, match=r"Only 1 of 2 hosts came to the rendezvous .*/rendezvous within 1 s"):
        launch(*options, "train", str(run_file), "--out", str(tmp_path))
    assert list((tmp_path / "rendezvous").iterdir()) == []


def test_an_address_of_another_host(run_file: Path, tmp_path: Path) -> None:
    options = ["--nnodes", "2", "--nproc", "1", "--address", "192.0.2.1"]
    with pytest.raises(LiaoyuanError, match=r"cannot listen on 192\.0\.2\.1: .* Give --address"):
        launch(*options, "train", str(run_file), "--out", str(tmp_path))


def test_a_job_file_needs_a_number_of_processes(run_file: Path) -> None:
    with pytest.raises(LiaoyuanError, match="A job file needs a number: --nproc"):
        launch("--slurm", "job.sh", "train", str(run_file))


def test_what_the_workers_refuse_is_not_tried_again(run_file: Path, tmp_path: Path) -> None:
    job = Job(run_file, tmp_path, "--nproc", "1", settings=("corpus=nowhere",))
    assert job.wait() == 2
    assert job.said.count("launch: 1 process on 1 host") == 1
    assert job.said.splitlines()[-1].startswith("liaoyuan: ")
    assert "nowhere" in job.said.splitlines()[-1]


def test_mistakes_do_not_wait_for_torch() -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", "liaoyuan", "launch", "trian"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "typer" in done.stderr
    assert not re.search(r"(?m)\|\s+torch$", done.stderr)

"""Whatever is killed, stopped or torn, the job goes on by itself and its losses are those of one never interrupted."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compute.job import Job, first_host, losses, newest_state, weights

HOSTS = ("--nproc", "1", "--lost-after", "3", "--join-timeout", "60")


def assert_same(folder: Path, uninterrupted: Path) -> None:
    assert losses(folder) == losses(uninterrupted)
    assert weights(folder) == weights(uninterrupted)


def test_a_job_killed_hung_stopped_and_torn_goes_on(run_file: Path, uninterrupted: Path, tmp_path: Path) -> None:
    job = Job(run_file, tmp_path, "--nproc", "2")
    job.wait_for_step(5)
    assert job.workers().keys() == {0, 1}
    job.process.kill()
    job.process.wait()
    end = time.monotonic() + 5
    while job.workers() and time.monotonic() < end:
        time.sleep(0.02)
    assert job.workers() == {}  # workers do not outlive their launcher

    job = Job(run_file, tmp_path, "--nproc", "2", "--hang-timeout", "3")
    job.wait_for_step(25)
    os.kill(job.workers()[1], signal.SIGKILL)
    job.wait_until(lambda: "was killed by SIGKILL after step" in job.said)
    assert "rank 1 on" in job.said
    job.wait_for_step(45)
    os.kill(job.workers()[0], signal.SIGSTOP)
    job.wait_until(lambda: "is stopped (SIGSTOP): no step for 3 s, so it is killed" in job.said)
    job.wait_for_step(65)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 130
    assert "liaoyuan: Stopped; the same command goes on from here." in job.said
    assert "Traceback" not in job.said

    newest = newest_state(tmp_path)
    assert int(newest.name.removeprefix("step-")) == len(losses(tmp_path))  # saved where it stopped
    torn = next(newest.glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-100])
    again = Job(run_file, tmp_path, "--nproc", "2")
    assert again.wait() == 0, again.said
    assert "truncated or corrupt" in again.said
    assert_same(tmp_path, uninterrupted)


def test_the_first_host_is_lost_and_another_takes_its_place(
    run_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    jobs = [Job(run_file, tmp_path, "--nnodes", "2", *HOSTS) for _ in range(2)]
    jobs[0].wait_for_step(25)
    lost = first_host(tmp_path, jobs)
    (other,) = set(jobs) - {lost}
    lost.kill_host()
    spare = Job(run_file, tmp_path, "--nnodes", "2", *HOSTS)
    assert (other.wait(), spare.wait()) == (0, 0), other.said + spare.said
    assert_same(tmp_path, uninterrupted)


def test_a_lost_host_leaves_the_work_to_fewer_processes(run_file: Path, uninterrupted: Path, tmp_path: Path) -> None:
    jobs = [Job(run_file, tmp_path, "--nnodes", "1:2", *HOSTS) for _ in range(2)]
    jobs[0].wait_for_step(25)
    lost = first_host(tmp_path, jobs)
    (other,) = set(jobs) - {lost}
    lost.kill_host()
    assert other.wait() == 0, other.said
    assert "1 process on 1 host" in other.said
    mine, theirs = losses(tmp_path), losses(uninterrupted)
    assert [step for step, _ in mine] == [step for step, _ in theirs]
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], abs=1e-5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_waited_for(run_file: Path, uninterrupted: Path, small_disk: Path) -> None:
    job = Job(run_file, small_disk / "run", "--nproc", "2")
    job.wait_for_step(25)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    job.wait_until(lambda: "No space left" in job.said or "disk is full" in job.said)
    ballast.unlink()
    assert job.wait() == 0, job.said
    assert_same(small_disk / "run", uninterrupted)

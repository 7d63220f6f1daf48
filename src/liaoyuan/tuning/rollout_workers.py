"""Rollouts by processes of their own, one step ahead of training: while it learns from a step they roll out the next.

Each worker has a process group with the trainer (gloo) over which it gets the weights, with their version, and a pipe
through which records come back. What is rolled out depends on the weights that were sent, on the seed and on the step,
never on which worker does it or when. Of a model that is trained by adapters these alone are sent: a worker reads what
lies below them from its folder. A worker that dies is replaced, gets the same weights and the same work again,
and the run ends as if nothing had been. Rollouts are one step old from the second step on (staleness 1; one-step
off-policy: Noukhovitch et al. 2024, arXiv 2410.18252), which truncated importance weights correct for.
"""

import contextlib
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # (not in __all__)

from liaoyuan.checkpoint.tensors import state_tensors
from liaoyuan.data import Tokenizer
from liaoyuan.errors import LiaoyuanError
from liaoyuan.models import Decoder
from liaoyuan.models.config import ModelConfig
from liaoyuan.models.lora import adapters_of
from liaoyuan.ops import is_exactness_sought, seek_exactness
from liaoyuan.rundir import write_atomic
from liaoyuan.tasks import Reward, Task
from liaoyuan.tuning.curriculum import Shares
from liaoyuan.tuning.recipe import ReinforceConfig
from liaoyuan.tuning.rollout import Rollouts, join
from liaoyuan.tuning.sources import Drawn, LocalRollouts, levels_of, missing
from liaoyuan.tuning.start import Start

PATIENCE = timedelta(seconds=60)  # of a process that meets the other one of its group
REPLACEMENTS = 5  # of workers in a row, after which it is not chance that they die
TOKENIZER = "worker-tokenizer"  # in the run folder
BEHIND = "behind-{:06d}.safetensors"  # in the run folder: what a resumed run makes the rollouts of this step with
Work = tuple[int, int, int, list[int], int]  # the arguments of `LocalRollouts.roll_out`


class WorkerRollouts:
    """A source of rollouts whose work `config.workers` processes do."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        task: Task,
        reward: Reward,
        config: ReinforceConfig,
        folder: Path,
        start: Start | None = None,
    ) -> None:
        """folder: of the run, where the workers find the tokenizer. start: what the model began as, if it has adapters,
        so that the workers can make it too.
        """
        if model.embed_tokens.weight.device.type != "cpu":
            raise LiaoyuanError("Rollout workers compute on the CPU, and the model is elsewhere: set rl.workers = 0.")
        tokenizer.save(folder / TOKENIZER)
        self._model, self._config = model, config
        made_of = start if start and start.has_adapters else model.config
        if adapters_of(model) and not isinstance(made_of, Start):
            raise ValueError("the workers of a model with adapters must be told what it began as")
        self._about = (made_of, folder / TOKENIZER, tokenizer.eos_ids, task, reward, config)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._sent = _flat(model), 0  # the weights that workers have, and their version
        self._count = 0  # of workers so far, which numbers their groups
        self._workers = [self._start() for _ in range(config.workers)]
        self._ahead: tuple[int, list[int], list[Work]] | None = None  # the step under way, its levels, its work

    @property
    def replaced(self) -> int:
        """How many workers died so far."""
        return self._count - len(self._workers)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid or 0 for worker in self._workers]

    def draw(self, step: int, shares: Shares) -> Drawn:
        """Return the rollouts of `step`, and let the workers begin with the next one on the weights of now."""
        if self._ahead is None or self._ahead[0] != step:
            self._publish(step)
            self._begin(step, shares)
        assert self._ahead is not None
        _, levels, work = self._ahead
        version = self._sent[1]
        parts = [self._collect(work)]
        for number in range(1, self._config.further_draws + 1):
            fresh = levels_of(self._config, step, number, shares, missing([part for part, _ in parts], self._config))
            if not fresh:
                break
            parts.append(self._collect(self._share_out(step, number, len(levels), fresh)))
            levels = [*levels, *fresh]
        seconds = sum(spent for _, spent in parts)
        self._publish(step)
        if step + 1 < self._config.steps:
            self._begin(step + 1, shares)
        return Drawn(join([part for part, _ in parts]), levels, seconds, step - version)

    def _begin(self, step: int, shares: Shares) -> None:
        levels = levels_of(self._config, step, 0, shares, self._config.problems)
        self._ahead = step, levels, self._share_out(step, 0, 0, levels)

    def _share_out(self, step: int, number: int, begin: int, levels: list[int]) -> list[Work]:
        """Give each worker its part of a draw; return the parts."""
        size = -(-len(levels) // len(self._workers))
        work = [
            (step, number, begin + first, levels[first : first + size], first) for first in range(0, len(levels), size)
        ]
        for worker, part in zip(self._workers, work, strict=False):
            worker.send(("roll out", part))
        return work

    def _collect(self, work: list[Work]) -> tuple[Rollouts, float]:
        """Return the rollouts of all parts, and the CPU seconds they took; a worker that died is replaced."""
        found: dict[int, tuple[Rollouts, float]] = {}
        died = 0
        while len(found) < len(work):
            pipes = {self._workers[place].pipe: place for place in range(len(work)) if place not in found}
            for ready in wait(list(pipes)):
                place = pipes[ready]  # type: ignore[index]
                try:
                    answer = self._workers[place].pipe.recv()
                except (EOFError, OSError):
                    died += 1
                    if died > REPLACEMENTS:
                        raise LiaoyuanError(
                            f"Rollout workers have died {died} times in one step: see the output above, or roll out in "
                            "the training process (rl.workers = 0)."
                        ) from None
                    self._workers[place] = self._start()
                    self._workers[place].send(("roll out", work[place]))
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                found[place] = answer
        parts = [found[place] for place in range(len(work))]
        return join([part for part, _ in parts]), sum(seconds for _, seconds in parts)

    def _publish(self, version: int) -> None:
        """Send the weights of now to all workers, which have nothing under way."""
        self._sent = _flat(self._model), version
        self._send()

    def _send(self) -> None:
        for place, worker in enumerate(self._workers):
            if not worker.take(*self._sent):
                self._workers[place] = self._start()

    def _start(self) -> "_Worker":
        """Start a worker, and give it the weights that the others have."""
        self._count += 1
        worker = _Worker(self._store, self._count, self._about)
        if not worker.take(*self._sent):
            raise LiaoyuanError("A rollout worker does not start: see its output above.")
        return worker

    def save(self, folder: Path, step: int) -> None:
        """Keep what makes the rollouts under way: the weights and the levels; they are made again from these."""
        if self._ahead is None or self._ahead[0] != step:
            return
        about = {"version": str(self._sent[1]), "levels": json.dumps(self._ahead[1])}
        write_atomic(folder / BEHIND.format(step), save({"weights": self._sent[0]}, about))
        for older in sorted(folder.glob(BEHIND.replace("{:06d}", "*")))[:-2]:  # as many as there are states
            older.unlink(missing_ok=True)

    def load(self, folder: Path, step: int) -> None:
        """Let the workers begin with `step` as those did of the run that stopped there."""
        path = folder / BEHIND.format(step)
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            about = file.metadata()
            self._sent = file.get_tensor("weights"), int(about["version"])
        self._send()
        levels = json.loads(about["levels"])
        self._ahead = step, levels, self._share_out(step, 0, 0, levels)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """A worker as the trainer sees it: the process, its pipe, and the group of the two."""

    def __init__(self, store: TCPStore, number: int, about: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        threads, is_exact = torch.get_num_threads(), is_exactness_sought()
        arguments = (theirs, store.port, number, threads, is_exact, about)
        self.process: BaseProcess = context.Process(target=work, args=arguments, daemon=True)
        try:
            self.process.start()
        except Exception as error:  # there are many reasons why something cannot be sent
            self.pipe.close()
            raise LiaoyuanError(
                f"The task or its reward cannot be given to another process ({error}): roll out in the training "
                "process (rl.workers = 0)."
            ) from error
        theirs.close()
        self._group: Any = None
        self._place = (store, number)

    def take(self, weights: Tensor, version: int) -> bool:
        """Broadcast weights; return whether the worker has them, which it has not if it died."""
        try:
            if self._group is None:
                self._group = _group(*self._place, rank=0)
            self.send(("weights", version))
            self._group.broadcast(weights, 0).wait()
            return bool(self.pipe.recv() == version)
        except (RuntimeError, EOFError, OSError):
            self.end()
            return False

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # that it died is found when its answer is read
            self.pipe.send(message)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def work(pipe: Connection, port: int, number: int, threads: int, is_exact: bool, about: tuple[Any, ...]) -> None:
    """Be a worker: take weights and roll out until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends its step first
    torch.set_num_threads(threads)
    seek_exactness(is_exact)
    made_of, folder, eos_ids, task, reward, config = about
    group = _group(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), number, rank=1)
    model = _made(made_of)
    tokenizer = Tokenizer.load(folder)
    tokenizer.eos_ids = eos_ids
    source = LocalRollouts(model, tokenizer, task, reward, config)
    weights = _flat(model)
    for name, argument in _messages(pipe):
        if name == "weights":
            group.broadcast(weights, 0).wait()
            _fill(model, weights)
            pipe.send(argument)
            continue
        begin = time.process_time()
        try:
            pipe.send((source.roll_out(*argument), time.process_time() - begin))
        except LiaoyuanError as error:
            pipe.send(error)


def _messages(pipe: Connection) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            yield pipe.recv()


def _group(store: TCPStore, number: int, rank: int) -> Any:
    """Meet the other process of a worker's group; the trainer has rank 0."""
    return ProcessGroupGloo(PrefixStore(f"rollouts/{number}", store), rank, 2, PATIENCE)


def _made(of: Start | ModelConfig) -> Decoder:
    """Return the model of a worker, whose weights, or adapters, are still to come."""
    if isinstance(of, Start):
        return of.load().eval()
    model = Decoder(of).eval().requires_grad_(False)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _flat(model: Decoder) -> Tensor:
    """Return a copy of what is state of the model as bytes, uint8 [B]."""
    tensors = state_tensors(model).values()
    return torch.cat([tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _fill(model: Decoder, weights: Tensor) -> None:
    begin = 0
    for tensor in state_tensors(model).values():
        part = weights[begin : begin + tensor.nbytes].clone()  # for the alignment of a wider dtype
        tensor.detach().copy_(part.view(tensor.dtype).view_as(tensor))
        begin += tensor.nbytes

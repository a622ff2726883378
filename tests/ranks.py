"""A pool of processes that run rank tests: a fresh start costs seconds, a job in a running pool a millisecond."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_JOB_TIMEOUT_S = 240
# Once a rank has failed, the others may fail too, or wait for it in vain.
_GRACE_S = 30

Join = Callable[[str, int, int, timedelta], None]


def join_gloo(init_method: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the default process group of a rank: gloo, for tensors on the host."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


class RankPool:
    """Processes of one world that run the same function together, job after job.

    Forked from the test process after collection, so that functions of any test module can be jobs, unless they use CUDA,
    which does not work in a fork of a process that used it. Joined by a file, not by a port, so that pools never meet.

    Args:
        world_size: how many processes.
        directory: for the file, of this pool alone or of pools of other sizes.
        join: makes the default process group.
        start_method: ``fork``, or ``spawn`` for CUDA.
    """

    def __init__(self, world_size: int, directory: Path, *, join: Join = join_gloo, start_method: str = "fork") -> None:
        context: Any = multiprocessing.get_context(start_method)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            init_method = f"file://{directory / f'join_{world_size}'}"
            # Not daemonic: jobs start data loader workers.
            process = context.Process(target=_serve, args=(theirs, join, init_method, rank, world_size), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` on every rank; give the results by rank, or raise with the tracebacks of all that failed."""
        for pipe in self._pipes:
            pipe.send((job, args))
        failures, results = {}, {}
        limit = time.monotonic() + _JOB_TIMEOUT_S
        while waiting := [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]:
            ready = wait(waiting, timeout=max(0, limit - time.monotonic()))
            if not ready:
                failures |= {self._pipes.index(pipe): "no answer in time" for pipe in waiting}
                self.close()
                break
            for rank in (self._pipes.index(pipe) for pipe in ready):
                error, results[rank] = self._answer(rank)
                if error:
                    failures[rank] = error
                    limit = min(limit, time.monotonic() + _GRACE_S)
        if failures:
            raise RankError("\n".join(f"rank {rank}: {error}" for rank, error in failures.items()))
        return [results[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> tuple[str | None, Any]:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return f"ended with exit code {self._processes[rank].exitcode}", None

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


class RankError(Exception):
    """A job failed on at least one rank; the first to fail comes first."""


def _serve(pipe: Connection, join: Join, init_method: str, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    join(init_method, rank, world_size, timedelta(seconds=_JOB_TIMEOUT_S))
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, job(*args)))
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))

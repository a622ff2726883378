"""A pool of gloo processes, shared by all rank tests: a fresh start costs seconds, a job in a running pool a millisecond."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_JOB_TIMEOUT_S = 240


class RankPool:
    """Processes of one gloo world that run the same function together, job after job.

    Forked from the test process after collection, so that functions of any test module can be jobs. Joined by a file,
    not by a port, so that pools never meet.
    """

    def __init__(self, world_size: int, directory: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemonic: jobs start data loader workers.
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, directory / f"join_{world_size}"), daemon=False
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` on every rank; give the results by rank, or raise with the tracebacks of all that failed."""
        for pipe in self._pipes:
            pipe.send((job, args))
        failures, results = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_JOB_TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {_JOB_TIMEOUT_S} s; before: {failures}")
            error, result = pipe.recv()
            results.append(result)
            if error:
                failures.append(f"rank {rank}: {error}")
        if failures:
            raise RankError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


class RankError(Exception):
    """A job failed on at least one rank."""


def _serve(pipe: Connection, rank: int, world_size: int, join_file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{join_file}", rank=rank, world_size=world_size, timeout=timedelta(seconds=_JOB_TIMEOUT_S)
    )
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, job(*args)))
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))

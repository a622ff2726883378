"""What disks refuse: found on any rank, known on all, told with the room that there is and the room that it takes."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from hbp_tune.errors import SaveError
from hbp_tune.parallel.agree import from_all_ranks

T = TypeVar("T")


def disk_problem(error: BaseException) -> str | None:
    """Tell what a disk had against writing, or None where the error is another one."""
    if isinstance(error, CheckpointException):  # of every rank that failed, by rank
        problems = [disk_problem(failure) for failure, _ in error.failures.values()]
        return None if None in problems else problems[0]
    if isinstance(error, OSError):
        return None if isinstance(error, ConnectionError) else str(error)
    text = " ".join(str(error).split())
    if "inline_container" in text or "PytorchStreamWriter" in text:  # torch's file writer counts bytes and forgets why
        return "fewer bytes were written than asked for: the disk is full, or a quota or file size limit is reached"
    return text if "I/O error" in text else None  # of safetensors, whose error type is its own


def first_disk_problem(work: Callable[[], object], pg: dist.ProcessGroup) -> str | None:
    """Do this rank's part of writing, and learn of the first rank that a disk kept from doing its own.

    Collective over ``pg``. Errors of any other kind are raised where they happen.
    """
    problem = None
    try:
        work()
    except BaseException as error:  # `CheckpointException` is not an `Exception`
        if (problem := disk_problem(error)) is None:
            raise
    return next((each for each in from_all_ranks(problem, pg) if each), None)


def export_weights(export: Callable[[], None], directory: Path, needed: int) -> None:
    """Write the final weights.

    Args:
        export: writes them.
        directory: where to, for the message.
        needed: bytes of the weights.

    Raises:
        SaveError: a disk refused them.
    """
    try:
        export()
    except Exception as error:
        if (reason := disk_problem(error)) is None:
            raise
        raise SaveError(
            f"the weights could not be exported to {directory}: {reason} ({describe_room(directory, needed)}); saved progress is "
            f"as it was. Free space, then resume with resume_from_checkpoint=True"
        ) from error


def num_bytes(state: object) -> int:
    """Count the bytes of the tensors in nested mappings and lists that this rank holds."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, list | tuple) else 0


def describe_room(directory: Path, needed: int) -> str:
    """Say how much of a disk is free and how much something takes, for people."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    return f"{free / 2**20:,.1f} MiB free, about {needed / 2**20:,.1f} MiB needed"

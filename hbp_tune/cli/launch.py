"""``hbp run``: torchtune's, except that the screen ends with what went wrong."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# torchrun's own lines about ranks that ended.
_LOGGERS = ("torch.distributed.elastic.multiprocessing", "torch.distributed.elastic.agent")
_MOSTLY = {
    "SIGKILL": "the machine's memory ran out (dmesg says so), or a scheduler ended it",
    "SIGBUS": "/dev/shm is too small for loader workers (num_workers=0 does without)",
    "SIGSEGV": "a library of compiled code failed",
    "SIGABRT": "a library of compiled code gave up, and what it said stands above",
    "SIGTERM": "a scheduler or somebody asked it to stop",
}
_MOST_LETTERS = 200


def launch(run: Callable[[], Any], *, several_nodes: bool = False) -> int:
    """Run a recipe, under torchrun or in this process.

    Args:
        run: torchtune's command.
        several_nodes: ranks run on other hosts, too.

    Returns:
        The exit status: 1 where a rank failed, 128 and the signal's number where a signal stopped the run.
    """
    if "LOGLEVEL" not in os.environ:
        _silence_torchrun()
    try:
        return run() or 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if line := _last_words(f"rank {rank} on {socket.gethostname()}" if several_nodes else f"rank {rank}", failure):
            sys.stderr.write(f"error: {line}\n")
        return 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _silence_torchrun() -> None:
    for name in [*_LOGGERS, *logging.root.manager.loggerDict]:  # some have levels of their own
        if name.startswith(_LOGGERS):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _last_words(rank: str, failure: ProcessFailure) -> str:
    """Say which rank ended and how; nothing where it did so itself, in one line."""
    if failure.exitcode < 0:
        name = failure.signal_name()
        return f"{rank} was ended by {name}" + (f": mostly, {_MOSTLY[name]}" if name in _MOSTLY else "")
    ended = f"{rank} ended with exit code {failure.exitcode}"
    if not isinstance(failure.message, dict):  # it left no record
        return f"{ended}; what it said stands above"
    if "Traceback" not in failure.message["extraInfo"]["py_callstack"]:  # see `end_in_one_line`
        return ""
    return f"{ended}: {' '.join(failure.message['message'].split())[:_MOST_LETTERS]}; its traceback stands above"

"""How a run's failure is told: by the rank that failed, once, and before those that fail because it is gone."""

import hashlib
import io
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NoReturn

# What gloo, NCCL and torch's store say where a peer's process has ended; time-outs are not among them, for their
# tracebacks say where a rank waited.
_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "communicator was aborted",
)
# torchrun looks at its workers ten times a second, and one that fails says so before it ends.
_WAIT_FOR_CAUSE_S = 5.0


def print_anywhere() -> None:
    """Let no letter that the terminal's encoding lacks end a run: it is shown as ``?``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def is_lost_contact(error: BaseException) -> bool:
    """Tell whether an error only says that another rank is gone."""
    return any(text in str(error) for text in _LOST_CONTACT)


def end_in_one_line(error: BaseException) -> NoReturn:
    """End this process with an error's message; of ranks with the same message, the first says it.

    Raises:
        SystemExit: always.
    """
    line = " ".join(str(error).split())
    _record_without_traceback(error)
    if _is_first_to_say(line):
        _say(f"error: {line}")
    raise SystemExit(1)


def record_for_torchrun(error: BaseException) -> None:
    """Leave an error where torchrun, which has the last word, looks for the first of a job."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _record_without_traceback(error: BaseException) -> None:
    """Record an error that needs no more words at torchrun's end."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    record_for_torchrun(error)


def end_after_cause(error: BaseException) -> NoReturn:
    """End this process after the rank whose end it suffers from has told why.

    torchrun ends the ranks of its own node before the wait is over, and then nothing is said at all.

    Raises:
        SystemExit: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_WAIT_FOR_CAUSE_S)
    _record_without_traceback(error)
    reason = " ".join(str(error).split())[:200]
    _say(
        f"rank {os.environ.get('RANK', '0')} lost contact with another rank; its error stands above, if it could tell. ({reason})"
    )
    raise SystemExit(1)


def _say(line: str) -> None:
    sys.stderr.write(f"\n{line}\n")
    sys.stderr.flush()


def _is_first_to_say(line: str) -> bool:
    """Ask torchrun's own store, which outlives every rank, whether another rank of this start has said the same."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # only where there are ranks

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_WAIT_FOR_CAUSE_S))
        digest = hashlib.sha256(line.encode()).hexdigest()
        num_said: int = store.add(f"hbp_tune/said/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{digest}", 1)
    except DistError:
        return True  # twice is better than never
    return num_said == 1

"""Signals that ask a run to save its progress and end."""

import os
import signal
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler that signals a whole job reaches a worker twice: directly, and through torchrun, which passes signals on.
_SAME_REQUEST_S = 2.0


class StopSignals:
    """Takes note of SIGTERM and SIGUSR1 from now on; the run looks at `received` after each step.

    A second signal ends the process at once, as it would have without this.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._handlers_before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._take_note) for number in STOP_SIGNALS
        }

    def restore(self) -> None:
        """Put the handlers of before back."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_s > _SAME_REQUEST_S:
            self.restore()
            os.kill(os.getpid(), number)

"""Numbers of a step as it ran, for people and metric loggers."""

import time

import torch


class StepClock:
    """Times optimizer steps: each reading is the time since the last one, and restarts the clock.

    Args:
        device: whose queued work must end before a reading counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start_s = time.perf_counter()

    def read_s(self) -> float:
        """Give seconds since the last reading."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now_s = time.perf_counter()
        elapsed_s, self._start_s = now_s - self._start_s, now_s
        return elapsed_s

"""How long a rank computes in each micro-step, without what it waits for others."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn


class BusyClock(Protocol):
    """Measures micro-steps, each between `start` and `stop`."""

    def start(self) -> None:
        """Begin a micro-step."""
        ...

    def stop(self) -> None:
        """End the micro-step."""
        ...

    def read_s(self) -> list[float]:
        """Give busy seconds of each micro-step since the last reading, and forget them."""
        ...


def busy_clock(device: torch.device, layers: Sequence[nn.Module]) -> BusyClock:
    """Make the clock that suits a device.

    Args:
        device: of the run.
        layers: of the decoder, after FSDP.
    """
    return LayerEventClock(layers, device) if device.type == "cuda" else CpuTimeClock()


class CpuTimeClock:
    """Counts CPU seconds of this process, all threads together, in forward and backward.

    A rank that waits for another one sleeps in gloo and burns next to none. Copies for collectives count.
    """

    def __init__(self) -> None:
        self._busy_s: list[float] = []
        self._start_s = 0.0

    def start(self) -> None:
        """Begin a micro-step."""
        self._start_s = time.process_time()

    def stop(self) -> None:
        """End the micro-step."""
        self._busy_s.append(time.process_time() - self._start_s)

    def read_s(self) -> list[float]:
        """Give busy seconds of each micro-step since the last reading, and forget them."""
        busy_s, self._busy_s = self._busy_s, []
        return busy_s


class LayerEventClock:
    """Counts device seconds of every layer's forward, by CUDA events around it.

    FSDP's hooks on the layers stand outside, so the wait for gathered weights, where ranks of a micro-step wait for the slowest
    one, is not counted; the exchange inside a context-parallel group is. The backward is left out: it takes a like share on
    every rank, and recomputation calls no hook. Hooks run around compiled code, not in it.

    Args:
        layers: of the decoder, after FSDP.
        device: that they run on.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._is_running = False
        self._micro_steps: list[list[torch.cuda.Event]] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._mark)
            layer.register_forward_hook(self._mark)

    def start(self) -> None:
        """Begin a micro-step."""
        self._micro_steps.append([])
        self._is_running = True

    def stop(self) -> None:
        """End the micro-step."""
        self._is_running = False

    def read_s(self) -> list[float]:
        """Give busy seconds of each micro-step since the last reading, and forget them; waits for the device."""
        torch.cuda.synchronize(self._device)
        micro_steps, self._micro_steps = self._micro_steps, []
        return [sum(a.elapsed_time(b) for a, b in zip(x[::2], x[1::2], strict=True)) / 1e3 for x in micro_steps]

    def _mark(self, *_: Any) -> None:
        if self._is_running:  # else it is validation
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._micro_steps[-1].append(event)

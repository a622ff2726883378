import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from hbp_tune.training import signals
from hbp_tune.training.signals import StopSignals


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    stop = StopSignals()
    yield stop
    stop.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_only_noted(stop: StopSignals, number: signal.Signals) -> None:
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert stop.received is number


def test_the_same_request_may_come_twice_at_once(stop: StopSignals) -> None:
    """As it does where a scheduler signals the workers, and torchrun passes on what it received itself."""
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received is signal.SIGUSR1


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    stop = StopSignals()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before
    stop.restore()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_a_later_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import time\n"
        "from hbp_tune.training.signals import StopSignals\n"
        "stop = StopSignals()\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(signals._SAME_REQUEST_S + 0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM

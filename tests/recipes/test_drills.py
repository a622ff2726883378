"""Drills: runs that are killed, stopped, denied their disk or restarted end with the losses of one that never was."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest

from hbp_tune.demo import prepare_demo
from tests.launching import end_of, losses, ranks_of, run, start, tune

pytestmark = pytest.mark.slow

NUM_STEPS = 24
SETTINGS = [
    "--config",
    "demo/tiny_llama_cpu",
    "groups.0.pack_len=128",
    "groups.1.pack_len=512",
    "planner.tokens_per_step=1024",
    "planner.overlong=truncate",
    "epochs=2",
    f"max_steps={NUM_STEPS}",
    "save_every_n_steps=2",
    "keep_last_n_checkpoints=2",
]
# Optimizers that do to their own process what a machine might do to it, at a given step of it.
PARTS = """
import os, resource, signal
from pathlib import Path

from torch.optim import AdamW


class Timed(AdamW):
    def __init__(self, params, *, rank, first, last, **kwargs):
        super().__init__(params, **kwargs)
        self.rank, self.first, self.last, self.steps = rank, first, last, 0

    def step(self, closure=None):
        self.steps += 1
        if int(os.environ["RANK"]) == self.rank:
            self.happen()
        return super().step(closure)


class DiesOnce(Timed):
    def happen(self):
        mark = Path("has_died")
        if self.steps == self.first and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class FullDisk(Timed):
    def happen(self):
        is_full = self.first <= self.steps < self.last
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if is_full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drills")
    (directory / "drill_parts.py").write_text(PARTS)
    prepare_demo(directory / "hbp_demo", num_samples=150, max_tokens=500)
    return directory


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[int, str]:
    """Give the losses of a run that nothing happens to."""
    run(tune(*SETTINGS, "output_dir=whole"), home)
    found = losses(home / "whole")
    assert sorted(found) == list(range(1, NUM_STEPS + 1))
    return found


def newest_step(output_dir: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in output_dir.glob("progress/step_*[0-9]")), default=0)


def is_saving(output_dir: Path) -> bool:
    return any(output_dir.glob("progress/step_*.tmp"))


def wait_until(happens: Callable[[], object], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 240
    while not happens():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < limit, "it does not get so far"
        time.sleep(0.001)


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize("is_async", [False, True])
def test_kill_minus_nine_at_five_random_points(home: Path, whole: dict[int, str], is_async: bool) -> None:
    """One rank and all processes in turn; every other time while progress is being saved."""
    rng = random.Random(int(is_async))
    name = f"killed_{'async' if is_async else 'sync'}"
    out = home / name
    command = tune(*SETTINGS, f"output_dir={name}", f"async_save={is_async}", "resume_from_checkpoint=auto")
    seen: dict[int, str] = {}
    num_half_written = 0
    for drill in range(5):
        before = newest_step(out)
        process = start(command, home)
        wait_until(lambda before=before: newest_step(out) > before, process)
        if drill % 2:
            wait_until(lambda: is_saving(out), process)
            time.sleep(rng.uniform(0, 0.01))
        else:
            time.sleep(rng.uniform(0, 0.5))
        if drill in (1, 2):
            ranks_of(process)[rng.randrange(2)].kill()
            killed_s = time.monotonic()
            end_of(process, code=1)
            assert time.monotonic() - killed_s < 60
        else:
            kill([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
            process.communicate()
        num_half_written += is_saving(out)
        seen |= losses(out)
        shutil.rmtree(out / "logs")  # the next log is read alone, so that no step hides what an earlier one said
        assert seen.items() <= whole.items()
    run(command, home)
    rest = losses(out)
    assert rest.items() <= whole.items()
    assert max(rest) == NUM_STEPS
    assert seen.keys() | rest.keys() == whole.keys()
    assert num_half_written, "some kills must come while progress is written"
    assert not is_saving(out), "what is half-written goes"


def test_signals_save_and_end(home: Path, whole: dict[int, str]) -> None:
    """SIGTERM and SIGUSR1, passed on by torchrun; then the rest of the run."""
    out = home / "stopped"
    command = tune(
        *SETTINGS, "output_dir=stopped", "resume_from_checkpoint=auto", launcher=("--signals-to-handle", "SIGTERM,SIGUSR1")
    )
    for number, first in ((signal.SIGTERM, 3), (signal.SIGUSR1, 9)):
        process = start(command, home)
        wait_until(lambda first=first: first in losses(out), process)
        process.send_signal(number)
        output = end_of(process, code=1)  # torchrun's own; that of the ranks is 0
        step = max(losses(out))
        assert f"Stopped by a signal after step {step} of {NUM_STEPS}; progress is in stopped/progress/step_{step}." in output
        assert newest_step(out) == step
        assert "exitcode" not in output, "no rank fails"
    run(command, home)
    assert losses(out) == whole


def test_a_full_disk_costs_saves_alone_until_the_third_in_a_row(home: Path, whole: dict[int, str]) -> None:
    out = home / "full"
    full = ["optimizer._component_=drill_parts.FullDisk", "optimizer.rank=1", "output_dir=full"]
    output = run(tune(*SETTINGS, *full, "optimizer.first=3", "optimizer.last=7"), home)
    assert output.count("could not be saved: [Errno 27] File too large") == 2
    assert losses(out) == whole
    assert newest_step(out) == NUM_STEPS
    shutil.rmtree(out)
    output = run(tune(*SETTINGS, *full, "optimizer.first=5", "optimizer.last=99"), home, code=1)
    assert output.count("error: progress of step 10 could not be saved: [Errno 27] File too large") == 1
    assert "the newest progress is step_4; it is failure 3 in a row" in output
    run(tune(*SETTINGS, "output_dir=full", "resume_from_checkpoint=True"), home)
    assert losses(out) == whole


def test_torchrun_restarts_go_on_from_the_newest_progress(home: Path, whole: dict[int, str]) -> None:
    dies = ["optimizer._component_=drill_parts.DiesOnce", "optimizer.rank=1", "optimizer.first=6", "optimizer.last=0"]
    command = tune(*SETTINGS, *dies, "output_dir=restarted", launcher=("--max-restarts", "2"))
    output = run(command, home)
    assert "Resuming after step 4 of 24" in output
    assert losses(home / "restarted") == whole


def test_changed_data_are_refused_with_both_fingerprints(home: Path, whole: dict[int, str]) -> None:
    """The last drill of this module, for it changes the data of all of them."""
    data = home / "hbp_demo/chat.jsonl"
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join([rows[1], rows[0], *rows[2:]]))
    output = run(tune(*SETTINGS, "output_dir=whole", "resume_from_checkpoint=True"), home, code=1)
    assert "store_fingerprint was " in output
    was, now = output.split("store_fingerprint was ")[1].split(";")[0].split(" and is now ")
    assert len(was) == len(now) == 32
    assert was != now
    assert output.count("error: cannot resume from whole/progress/step_24: store_fingerprint") == 1

"""What stands on the screen when a run of ``hbp run`` has ended."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hbp_tune.cli.launch import launch
from tests.launching import end_of, ranks_of, run, start

RECIPE = """
import os, signal, sys, time
from hbp_tune.config.packaged import run_recipe
from hbp_tune.errors import ConfigError

def main():
    how = sys.argv[-1].removeprefix("how=")
    if how == "wait":
        print("waiting", flush=True)
        time.sleep(60)
    if os.environ.get("RANK", "1") == "0":
        time.sleep(60)
    if how == "mend":
        raise ConfigError("pack_len=3 is odd")
    if how == "crash":
        {}["key"]
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)

run_recipe(main)
"""
LAST_LINES = {
    "mend": "error: pack_len=3 is odd",
    "crash": "error: rank 1 ended with exit code 1: KeyError: 'key'; its traceback stands above",
    "kill": "error: rank 1 was ended by SIGKILL: mostly, the machine's memory ran out (dmesg says so), or a scheduler ended it",
    "exit": "error: rank 1 ended with exit code 3; what it said stands above",
}


def failing(error: Exception) -> Callable[[], Any]:
    def run() -> None:
        raise error

    return run


def failure(tmp_path: Path, exitcode: int, callstack: str | None = None) -> ChildFailedError:
    if callstack is not None:
        extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
        (tmp_path / "error.json").write_text(json.dumps({"message": {"message": "KeyError: 'key'", "extraInfo": extra}}))
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file=str(tmp_path / "error.json"))
    return ChildFailedError("recipe", {9: failed})


def test_a_rank_that_told_why_has_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(failing(failure(tmp_path, 1, "KeyError: 'key'\n"))) == 1
    assert capsys.readouterr().err == ""


def test_others_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(failing(failure(tmp_path, -7))) == 1
    assert capsys.readouterr().err == (
        "error: rank 9 was ended by SIGBUS: mostly, /dev/shm is too small for loader workers (num_workers=0 does without)\n"
    )
    assert launch(failing(failure(tmp_path, 1, "Traceback (most recent call last):\n  ...")), several_nodes=True) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: rank 9 on ")
    assert line.endswith(" ended with exit code 1: KeyError: 'key'; its traceback stands above\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_user_stopped_needs_no_words(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(failing(SignalException("stopped", number))) == 128 + number
    assert capsys.readouterr().err == ""


def test_the_status_of_a_recipe_is_passed_on() -> None:
    assert launch(lambda: None) == 0
    assert launch(lambda: 2) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "ends.py").write_text(RECIPE)
    (folder / "own.yaml").write_text("how: null\n")
    return folder


def hbp(how: str, *launcher: str) -> list[str]:
    return [sys.executable, "-m", "hbp_tune.cli", "run", *launcher, "ends", "--config", "own.yaml", f"how={how}"]


@pytest.mark.slow
@pytest.mark.parametrize("how", LAST_LINES)
def test_the_screen_ends_with_what_went_wrong(folder: Path, how: str) -> None:
    lines = run(hbp(how, "--nproc_per_node", "2"), folder, code=1).strip().splitlines()
    assert lines[-1] == LAST_LINES[how]
    assert not any("failed (exitcode" in line or "closing signal" in line or "ChildFailedError" in line for line in lines)
    assert sum(line.startswith("Traceback") for line in lines) == (1 if how == "crash" else 0)


@pytest.mark.slow
def test_one_process_ends_alike(folder: Path) -> None:
    assert run(hbp("mend"), folder, code=1).strip().splitlines()[-1] == LAST_LINES["mend"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("--nproc_per_node", "2")])
def test_ctrl_c_leaves_no_traceback(folder: Path, launcher: tuple[str, ...]) -> None:
    process = start(hbp("wait", *launcher), folder)
    assert process.stdout
    while "waiting" not in process.stdout.readline():
        pass
    if launcher:
        while len(ranks_of(process)) < 2:
            time.sleep(0.1)
        time.sleep(3)  # until the other waits, too
    process.send_signal(signal.SIGINT)
    output = end_of(process, code=130)
    assert "Traceback" not in output

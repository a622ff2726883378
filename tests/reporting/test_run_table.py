import io
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from hbp_tune.planning import PackingGroup
from hbp_tune.reporting import RunTable
from hbp_tune.reporting.terminal import run_table
from hbp_tune.reporting.terminal.run_table import progress_line

GROUPS = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=131072, cp_degree=8, ac_layers=29))
GROUP_OF_STEP = np.array([0, 1, 0, 0])


def metrics(step: int, **more: float) -> dict[str, float]:
    rate = {"tokens_per_second_per_gpu": 1000.0, "num_tokens": 8000, "step_s": 2.0, "idle_ratio": 0.1 * step}
    return {"loss": 2.0 - step / 10, **rate, "time_left_s": 60.0 * (3 - step), **more}


def table(console: Console, **settings: object) -> RunTable:
    return RunTable(GROUPS, GROUP_OF_STEP, world_size=4, console=console, **settings)  # type: ignore[arg-type]


def paper() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_and_a_summary_where_there_is_no_terminal() -> None:
    shown = table(console := paper())
    for step in range(4):
        shown.update(metrics(step))
    shown.close()
    first, last, *summary = text(console).splitlines()
    assert first == "Step 1 of 4: loss 2.0000|short|1,000 tokens/s/rank|0:03 h left"
    assert last == "Step 4 of 4: loss 1.7000|short|1,000 tokens/s/rank|0:00 h left"  # those between came within ten seconds
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in summary if line.startswith("│")]
    assert rows == [
        ["short", "1,024", "1", "3 of 3", "1.7000", "1,000", "16.7%", "75%", "-"],
        ["long", "131,072", "8", "1 of 1", "1.9000", "1,000", "10.0%", "25%", "-"],
    ]
    assert "Step 4 of 4, 32,000 tokens at 1,000/s/rank, 0:00:00" in text(console)
    assert "left" not in summary[0]
    assert max(map(len, summary)) <= 80


def test_a_line_is_due_after_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(run_table.time, "monotonic", lambda: now_s)
    shown = table(console := paper())
    shown.update(metrics(0))
    now_s += 9.9
    shown.update(metrics(1))
    now_s += 0.1
    shown.update(metrics(2))
    assert [line.split(":")[0] for line in text(console).splitlines()] == ["Step 1 of 4", "Step 3 of 4"]


def test_a_terminal_shows_one_table_that_stays() -> None:
    shown = table(console := terminal())
    for step in range(4):
        shown.update(metrics(step, peak_memory_gib_short=70.25))
    shown.say("Validation after step 4: loss 1.5")
    shown.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text(console)).splitlines()
    assert all(len(line) <= 80 for line in drawn)
    assert [line.strip() for line in drawn if "of 4" in line][-1].startswith("Step 4 of 4, 32,000 tokens")
    assert any("70.2" in line for line in drawn)
    assert "Validation after step 4: loss 1.5" in drawn
    assert "Step 1 of 4: loss" not in text(console)
    assert text(console).rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_logs_are_printed_above_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logger = logging.getLogger("test_run_table")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        shown = table(console := terminal())
        logger.warning("a checkpoint was saved")
        assert "a checkpoint was saved" in text(console)
        shown.close()
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    assert stderr.getvalue() == "afterwards\n"
    assert handler.stream is sys.stderr is stderr


def test_a_resumed_run_counts_its_own_steps() -> None:
    shown = table(console := paper(), first_step=3)
    shown.update(metrics(3))
    shown.close()
    assert "Step 4 of 4" in text(console)
    assert re.search(r"short .* 1 of 1 ", text(console))
    assert re.search(r"long .* 0 of 0 ", text(console))


def test_other_ranks_show_nothing() -> None:
    shown = table(console := terminal(), is_shown=False)
    shown.update(metrics(0))
    shown.say("nobody reads this")
    shown.close()
    assert text(console) == ""


def test_a_step_in_words() -> None:
    metrics = {"loss": 1.25, "tokens_per_second_per_gpu": 12345.6}
    assert progress_line(metrics, "short") == "loss 1.2500|short|12,346 tokens/s/rank"
    line = "loss 1.2500|short|12,346 tokens/s/rank|"
    assert progress_line(metrics | {"time_left_s": 29.0}, "short") == line + "0:00 h left"
    assert progress_line(metrics | {"time_left_s": 3599.0}, "short") == line + "1:00 h left"
    assert progress_line(metrics | {"time_left_s": 26 * 3600 + 63}, "short") == line + "26:01 h left"


ASCII_RUN = """
import numpy as np
from hbp_tune.config.failures import print_anywhere
from hbp_tune.planning import PackingGroup
from hbp_tune.reporting import RunTable

print_anywhere()
groups = (PackingGroup(name="k\\xfcrz\\u2026", pack_len=64),)
for console in (None, "terminal"):
    from rich.console import Console
    console = console and Console(force_terminal=True, width=80)
    table = RunTable(groups, np.array([0, 0]), world_size=1, console=console)
    for step in (1, 2):
        table.update({"loss": 1.0, "tokens_per_second_per_gpu": 1.0, "num_tokens": 8, "step_s": 1.0, "idle_ratio": 0.0})
    table.close()
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_with_few_letters(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    command = [sys.executable, "-c", ASCII_RUN]
    done = subprocess.run(command, env=environment, capture_output=True, encoding=encoding, check=False)
    assert done.returncode == 0, done.stderr
    assert "+--" in done.stdout
    assert "Error" not in done.stderr

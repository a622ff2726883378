"""Starting runs as users do, in processes of their own, and reading what they left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Start a command in a folder, whose modules it can import."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{cwd}:{os.environ.get('PYTHONPATH', '')}",
        "HF_DATASETS_CACHE": str(cwd / "cache"),
    }
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end_of(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """Wait for a command; give what it printed."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-4000:]
    return output


def run(command: list[str], cwd: Path, *, code: int = 0) -> str:
    """Run a command in a folder to its end; give what it printed."""
    return end_of(start(command, cwd), code=code)


def tune(*arguments: str, name: str = "hbp_full_finetune_distributed", launcher: tuple[str, ...] = ()) -> list[str]:
    """Give the command that trains on two ranks."""
    return ["tune", "run", "--nproc_per_node", "2", *launcher, name, *arguments]


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Find the processes that torchrun started, by rank; each has a session of its own."""
    found = {}
    for process in psutil.Process(launcher.pid).children():
        if (rank := process.environ().get("RANK")) is not None:
            found[int(rank)] = process
    return found


def losses(output_dir: Path) -> dict[int, str]:
    """Give the logged loss and gradient norm of each step, to the last digit; later logs replace earlier ones."""
    found: dict[int, str] = {}
    for log in sorted(output_dir.glob("logs/log_*.txt"), key=lambda path: path.stat().st_mtime):
        for line in log.read_text().splitlines():
            if match := re.match(r"Step (\d+) \| (loss:\S+) \S+ (grad_norm:\S+)", line):
                found[int(match[1])] = f"{match[2]} {match[3]}"
    return found

"""``hbp report``: a page about a run, from what it logged."""

import argparse
import sys
from pathlib import Path
from typing import Any

from hbp_tune.errors import ConfigError
from hbp_tune.reporting import read_run_log, render_run_page


def add_report(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "report",
        prog="hbp report",
        help="Make a page about a run: loss, speed, waiting and memory, by packing group.",
        description="Make one HTML page from what a run logged to disk (torchtune's DiskLogger, which packaged configurations "
        "use), while it runs or after it.",
    )
    parser.add_argument("output_dir", type=Path, help="of the run, or the folder with its log_*.txt")
    parser.add_argument("--page", type=Path, help="file to write (default: run.html in that folder)")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    log = read_run_log(args.output_dir)
    path = args.page or args.output_dir / "run.html"
    try:
        path.write_text(render_run_page(log, str(args.output_dir)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"{len(log.steps):,} steps, to step {log.steps[-1]:,}\nWritten: {path}\n")
    return 0

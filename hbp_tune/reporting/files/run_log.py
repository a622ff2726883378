"""What a run logged to disk, as numbers by step."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError

_LINE = re.compile(r"Step (\d+) \| (.*)")


class RunLog(NamedTuple):
    """Figures of a run.

    Args:
        steps: optimizer steps that logged anything, ascending.
        figures: by step, by key.
    """

    steps: tuple[int, ...]
    figures: dict[int, dict[str, float]]

    def column(self, key: str) -> NDArray[np.float64]:
        """Give a figure of every step, ``float64[steps]``; not a number where a step did not log it."""
        return np.array([self.figures[step].get(key, np.nan) for step in self.steps])

    def keys(self, prefix: str) -> list[str]:
        """List the keys that begin so, in the order in which they came first."""
        return list(dict.fromkeys(key for step in self.steps for key in self.figures[step] if key.startswith(prefix)))


def read_run_log(output_dir: Path) -> RunLog:
    """Read what torchtune's DiskLogger wrote; a resumed run's later files replace steps of earlier ones.

    Args:
        output_dir: of the run, with ``logs/log_*.txt``; or a folder of such files.

    Raises:
        ConfigError: there are none, or they hold no step.
    """
    folder = output_dir / "logs" if (output_dir / "logs").is_dir() else output_dir
    files = sorted(folder.glob("log_*.txt"), key=lambda path: (path.stat().st_mtime, path.name))
    if not files:
        raise ConfigError(
            f"{folder} has no log_*.txt; a report needs what metric_logger torchtune.training.metric_logging.DiskLogger writes"
        )
    figures: dict[int, dict[str, float]] = {}
    for file in files:
        in_file: dict[int, dict[str, float]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := _LINE.match(line):
                step = in_file.setdefault(int(match[1]), {})
                step |= {key: value for key, value in map(_pair, match[2].split()) if value is not None}
        if in_file:  # steps from where it began are another run's, or the same ones again
            figures = {step: row for step, row in figures.items() if step < min(in_file)} | in_file
    if not figures:
        raise ConfigError(f"{folder} holds no logged step yet")
    return RunLog(steps=tuple(sorted(figures)), figures=figures)


def _pair(word: str) -> tuple[str, float | None]:
    key, _, value = word.rpartition(":")
    try:
        return key, float(value)
    except ValueError:
        return key, None

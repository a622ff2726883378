"""How a run goes, for people: a table by group that is drawn anew at every step on a terminal, and lines elsewhere."""

import atexit
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hbp_tune.planning.plans.records import PackingGroup

# Seconds between lines where there is no terminal: a log of a week has no use for every step.
_LINE_EVERY_S = 10.0


@dataclass(slots=True)
class _GroupSoFar:
    """What the steps of a group came to."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    idle_s: float = 0.0
    loss: float = 0.0
    peak_memory_gib: float | None = None  # nothing on a CPU


class RunTable:
    """Shows steps as they are done; at the end the table stays, or is printed, as the summary.

    Args:
        groups: of the plan.
        group_of_step: ``int64[num_steps]``, of the whole run, index into ``groups``.
        world_size: ranks.
        first_step: that this process trains, counted from 0.
        is_shown: whether this rank shows anything.
        console: where to; the standard error by default.
    """

    def __init__(
        self,
        groups: Sequence[PackingGroup],
        group_of_step: NDArray[np.int64],
        *,
        world_size: int,
        first_step: int = 0,
        is_shown: bool = True,
        console: Console | None = None,
    ) -> None:
        self._groups, self._group_of_step, self._world_size = groups, group_of_step, world_size
        self._step = self._first_step = first_step
        self._console = console or Console(stderr=True, highlight=False)
        self._so_far = [_GroupSoFar() for _ in groups]
        self._is_shown = is_shown
        self._started_s = self._line_s = time.monotonic()
        self._left_s: float | None = None
        self._live: Live | None = None
        self._planned = np.bincount(group_of_step[first_step:], minlength=len(groups))
        self._handlers: list[logging.StreamHandler] = []  # of logs, while they write through the table
        if is_shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._go_live()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take in the next step.

        Args:
            metrics: by the names under which they are logged (docs/metrics.md).
        """
        so_far = self._so_far[group := int(self._group_of_step[self._step])]
        so_far.steps += 1
        so_far.tokens += int(metrics["num_tokens"])
        so_far.seconds += metrics["step_s"]
        so_far.idle_s += metrics["idle_ratio"] * metrics["step_s"]
        so_far.loss = metrics["loss"]
        so_far.peak_memory_gib = metrics.get(f"peak_memory_gib_{self._groups[group].name}")
        self._left_s = metrics.get("time_left_s")
        self._step += 1
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif self._is_shown and self._is_line_due():
            self.say(f"Step {self._step:,} of {len(self._group_of_step):,}: {progress_line(metrics, self._groups[group].name)}")

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        if self._is_shown:
            self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the table as the run's summary, and streams as they were."""
        if self._live:
            self._live.stop()
            atexit.unregister(self._live.stop)
            for handler in self._handlers:
                handler.setStream(sys.stderr)
        elif self._is_shown and self._step > self._first_step:
            self._console.print(self._table())
        self._is_shown, self._live = False, None

    def _go_live(self) -> None:
        # Without a thread that redraws: processes that read packs are forked from this one.
        self._live = Live(self._table(), console=self._console, auto_refresh=False)
        before = sys.stderr
        self._live.start(refresh=True)
        atexit.register(self._live.stop)  # it hides the cursor, which an error must not leave hidden
        # Handlers write to what the standard error was when they were made, through the table.
        loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
        for logger in (logging.root, *loggers):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    self._handlers.append(handler)
                    handler.setStream(sys.stderr)

    def _is_line_due(self) -> bool:
        now_s = time.monotonic()
        is_first_or_last = self._step in (self._first_step + 1, len(self._group_of_step))
        if is_due := is_first_or_last or now_s - self._line_s >= _LINE_EVERY_S:
            self._line_s = now_s
        return is_due

    def _table(self) -> Table:
        table = Table(title=self._title())
        for name in ("group", "length", "CP", "steps", "loss", "tokens/s\n/rank", "idle", "time", "GiB"):
            table.add_column(name, justify="left" if name == "group" else "right")
        seconds = sum(so_far.seconds for so_far in self._so_far)
        for index, (group, so_far) in enumerate(zip(self._groups, self._so_far, strict=True)):
            steps = f"{so_far.steps:,} of {self._planned[index]:,}"
            row = [group.name, f"{group.pack_len:,}", str(group.cp_degree), steps]
            if so_far.steps:
                row += [
                    f"{so_far.loss:.4f}",
                    f"{so_far.tokens / so_far.seconds / self._world_size:,.0f}",
                    f"{so_far.idle_s / so_far.seconds:.1%}",
                    f"{so_far.seconds / seconds:.0%}",
                    "-" if so_far.peak_memory_gib is None else f"{so_far.peak_memory_gib:.1f}",
                ]
            table.add_row(*row)
        return table

    def _title(self) -> str:
        parts = [f"Step {self._step:,} of {len(self._group_of_step):,}"]
        seconds = sum(so_far.seconds for so_far in self._so_far)
        if seconds:
            tokens = sum(so_far.tokens for so_far in self._so_far)
            parts.append(f"{tokens:,} tokens at {tokens / seconds / self._world_size:,.0f}/s/rank")
        parts.append(_clock(time.monotonic() - self._started_s))
        if self._left_s is not None and self._step < len(self._group_of_step):
            parts.append(f"{_clock(self._left_s)} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def progress_line(metrics: Mapping[str, float], group: str) -> str:
    """Say in a few words how a step went: ``loss 1.2345|short|6,789 tokens/s/rank|0:12 h left``."""
    line = f"loss {metrics['loss']:.4f}|{group}|{metrics['tokens_per_second_per_gpu']:,.0f} tokens/s/rank"
    if "time_left_s" not in metrics:
        return line
    hours, minutes = divmod(round(metrics["time_left_s"] / 60), 60)
    return f"{line}|{hours}:{minutes:02} h left"

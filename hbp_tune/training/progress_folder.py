"""The folder of a run's saved progress: written aside, synced, renamed; only renamed folders count."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

RECORD = "progress.json"


class ProgressFolder:
    """Holds ``step_N`` folders. What changes it is called on rank 0 alone.

    Args:
        directory: made when the first save begins.
        keep: newest finished folders that are kept.
    """

    def __init__(self, directory: Path, *, keep: int = 1) -> None:
        self.directory = directory
        self._keep = keep

    def finished(self) -> list[Path]:
        """Give the finished folders, oldest first."""
        folders = [path for path in self.directory.glob("step_*") if path.suffix != ".tmp" and (path / RECORD).exists()]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))

    def aside(self, step: int) -> Path:
        """Name the folder that a step's progress is written to before it counts."""
        return self.directory / f"step_{step}.tmp"

    def begin(self, step: int) -> None:
        """Make room for a step's progress; what a crash left half-written goes."""
        self.discard_unfinished()
        self.aside(step).mkdir(parents=True)

    def publish(self, step: int) -> Path:
        """Give a step's progress its final name, and remove what is older than the last ``keep``."""
        final = self.directory / f"step_{step}"
        _sync_folder(self.aside(step))
        shutil.rmtree(final, ignore_errors=True)
        self.aside(step).rename(final)
        _sync(self.directory)  # the new name, too, must outlive a power cut before older progress goes
        for old in self.finished()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def discard_unfinished(self) -> None:
        """Remove half-written progress."""
        for path in self.directory.glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path) -> Path | None:
    """Rename the progress of an older run to ``<name>_1`` or the next free number, so that a new run cannot mix with it.

    Returns:
        The new name, or None if there was nothing worth keeping.
    """
    if not ProgressFolder(directory).finished():
        return None
    number = 1
    while (aside := directory.with_name(f"{directory.name}_{number}")).exists():
        number += 1
    return directory.rename(aside)


def _sync_folder(folder: Path) -> None:
    """Force every file below to disk, so that a rename never names half-written content."""
    paths: Sequence[Path] = [*folder.rglob("*"), folder]
    for path in paths:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

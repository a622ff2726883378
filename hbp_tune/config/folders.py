"""Folders that a run writes to: what refuses is told in one line that names the folder and its key."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbp_tune.errors import ConfigError, DataError


def output_folder(name: str | Path, key: str = "output_dir") -> Path:
    """Make the folder of a run's results, before anything is computed that would be lost without it.

    Raises:
        ConfigError: it cannot be made or written.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no permission, or a read-only disk"
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
    if reason:
        raise ConfigError(f"{key}={folder} cannot be written: {reason}; name another folder")
    return folder


@contextmanager
def writing_token_store(directory: Path) -> Iterator[None]:
    """Turn what a disk has against writing below the folder of token stores into one line.

    Raises:
        DataError: it cannot be written.
        OSError: another file is what failed.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(directory):
            raise  # of a file that is read
        raise DataError(
            f"token store folder {directory} cannot be written: {error.strerror or error}; set token_store_dir to one that can"
        ) from error

"""JSON lines at random: a row is read when it is asked for, as it stands in its file.

Not by Hugging Face's loader: Arrow gives all rows of a column one type, and fills what a row does not have with nulls. A tool's
schema, or a call's arguments, would then hold the keys of all other tools, and a template would render them.
"""

import bisect
import gzip
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hbp_tune.data.chats.json_lines import fault_of_row, parse_line
from hbp_tune.errors import ConfigError, DataError


class LineFiles:
    """Rows of files of JSON lines, one file after the other; 8 bytes a row are in memory.

    Args:
        files: of JSON lines, ``.gz`` or not.
        cache: folder for copies of compressed files, which cannot be read at random.
    """

    def __init__(self, files: Sequence[Path], cache: Path) -> None:
        self._files = [_unpacked(file, cache) if file.name.lower().endswith(".gz") else file for file in files]
        self._offsets = [_line_offsets(file) for file in self._files]
        self._starts = np.cumsum([0, *map(len, self._offsets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row.

        Raises:
            DataError: its line is not a JSON object in UTF-8.
        """
        file = bisect.bisect_right(self._starts, index) - 1
        with self._files[file].open("rb") as stream:  # opened here: a forked process would move its parent's place in the file
            stream.seek(self._offsets[file][index - self._starts[file]])
            value, fault = parse_line(stream.readline())
        if fault:
            raise DataError(fault)
        row: dict[str, Any] = value
        return row


class ArrayRows:
    """Rows of JSON files that hold all of them in one array, alone or in an object such as ``{"data": [...]}``.

    Args:
        files: that are not JSON lines.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._rows = [row for file in files for row in _read_array(file)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give a row.

        Raises:
            DataError: it is not an object, or holds half a character.
        """
        value = self._rows[index]
        if fault := fault_of_row(value):
            raise DataError(fault)
        row: dict[str, Any] = value
        return row


def _read_array(file: Path) -> list[Any]:
    """Read a file of one array.

    Raises:
        ConfigError: it is none.
    """
    opened: Any = gzip.open if file.name.lower().endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8-sig") as stream:
            value = json.load(stream)
    except (ValueError, EOFError, OSError, RecursionError) as error:
        raise ConfigError(f"data file {file} is not JSON: {error or type(error).__name__}") from error
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else [value]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ConfigError(f"data file {file} holds no array of rows; write one row a line, or one array")
    rows: list[Any] = lists[0]
    return rows


def _line_offsets(file: Path) -> NDArray[np.int64]:
    """Find where the lines that are not blank begin, ``int64[num_rows]``."""
    offsets = array("q")
    offset = 0
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                offsets.append(offset)
            offset += len(line)
    return np.frombuffer(offsets, dtype=np.int64) if offsets else np.empty(0, dtype=np.int64)


def _unpacked(file: Path, cache: Path) -> Path:
    """Unpack a compressed file, once for all who read it.

    Raises:
        DataError: it is broken.
        ConfigError: there is no room for it.
    """
    status = file.stat()
    name = hashlib.sha256(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()[:32]
    path = cache / f"unpacked-{name}.jsonl"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                aside = path.with_suffix(".tmp")
                with gzip.open(file, "rb") as packed, aside.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 2**22)
                os.replace(aside, path)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"data file {file} is not a whole gzip file: {error}; copy it again") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; set HF_DATASETS_CACHE to another folder"
        ) from error
    return path

"""JSON lines that Hugging Face's loader refuses: one bad line, and it gives up the whole file.

Its ``json`` loader reads blocks of lines at once, so it fails on one broken line, on broken UTF-8, and on a column whose type
changes, and does not say where. Here the lines are read one by one, and a copy without the bad ones is kept.
"""

import gzip
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hbp_tune.errors import DataError

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_LOOK_EVERY = 10_000
# What an object is called that holds all rows in one array.
_WRAPPERS = {"data", "rows", "train", "examples", "instances", "samples"}
_ROWS, _BAD = "rows.npy", "bad.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CleanFile:
    """A copy of a file without its bad lines, or the file itself where it has none.

    Args:
        path: of the copy.
        rows: ``int32[lines of the copy]``, each one's row in the file.
        bad_rows: the others, with the reason.
    """

    path: Path
    rows: NDArray[np.int32]
    bad_rows: dict[int, str]


def is_json_lines(file: Path) -> bool:
    """Tell whether a file holds one JSON value a line: by its name, and by its first line, which may be a bad row."""
    if not file.name.lower().endswith(_SUFFIXES):
        return False
    lines = [line for _, line in itertools.islice(numbered_lines(file), 2)]
    if not lines:
        return True
    text = lines[0].decode("utf-8-sig", errors="replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # One broken line among others, or the beginning of a value that goes on over several.
        return not (text.startswith("[") or text == "{" or (text.startswith("{") and text.endswith(("[", "{"))))
    if len(lines) > 1:
        return True
    is_wrapper = isinstance(value, dict) and len(value) == 1 and value.keys() <= _WRAPPERS
    return not isinstance(value, list) and not is_wrapper


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines that are rows, all but blank ones, with their numbers from 1.

    Raises:
        DataError: a compressed file is broken.
    """
    opened: Any = gzip.open if file.name.lower().endswith(".gz") else open
    with opened(file, "rb") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"data file {file} is not a whole gzip file: {error}; copy it again") from error


def clean(file: Path, digest: str, directory: Path, *, same_types: bool, watch: Callable[[int], None]) -> CleanFile:
    """Find a file's bad lines and keep a copy without them, made once by whoever comes first.

    Args:
        file: of JSON lines.
        digest: of its bytes, which names the copy.
        directory: of the token stores.
        same_types: leave out lines whose types differ from those of most lines, too.
        watch: called with a growing number.
    """
    folder = clean_folder(digest, directory, same_types)
    directory.mkdir(parents=True, exist_ok=True)
    while not folder.exists():
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=1):
                if not folder.exists():
                    _write_clean(file, folder, same_types, watch)
        except Timeout:
            watch(0)
    bad_rows = {int(row): reason for row, reason in json.loads((folder / _BAD).read_text(encoding="utf-8")).items()}
    return CleanFile(path=folder / _copy_name(file) if bad_rows else file, rows=np.load(folder / _ROWS), bad_rows=bad_rows)


def clean_folder(digest: str, directory: Path, same_types: bool) -> Path:
    """Name the folder of a file's copy without bad lines."""
    return directory / f"clean-{digest}{'-types' if same_types else ''}"


def _copy_name(file: Path) -> str:
    return f"{file.name.split('.')[0]}.jsonl"


def _write_clean(file: Path, folder: Path, same_types: bool, watch: Callable[[int], None]) -> None:
    bad_rows = find_bad_rows((line for _, line in numbered_lines(file)), same_types=same_types, watch=watch)
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    rows = []
    with (aside / _copy_name(file)).open("wb") as copy:
        for row, (_, line) in enumerate(numbered_lines(file)):
            if row not in bad_rows:
                rows.append(row)
                if bad_rows:
                    copy.write(line.rstrip(b"\r\n") + b"\n")
            if row % _LOOK_EVERY == 0:
                watch(row)
    np.save(aside / _ROWS, np.array(rows, dtype=np.int32))
    (aside / _BAD).write_text(json.dumps(bad_rows), encoding="utf-8")
    os.rename(aside, folder)


def find_bad_rows(lines: Iterable[bytes], *, same_types: bool, watch: Callable[[int], None]) -> dict[int, str]:
    """Find the lines that are not a JSON object in UTF-8, or whose types are not those of most lines.

    Args:
        lines: that are not blank; their position is the row.
        same_types: compare types.
        watch: called with a growing number.

    Returns:
        The reason of each bad row, in order.
    """
    bad_rows: dict[int, str] = {}
    # Lines of one structure share one entry, so that a million lines cost 8 bytes each.
    structures: dict[frozenset[tuple[str, str]], list[int]] = defaultdict(list)
    for row, line in enumerate(lines):
        value, fault = parse_line(line)
        if fault:
            bad_rows[row] = fault
        elif same_types:
            structures[frozenset(_kinds(value, ""))].append(row)
        if row % _LOOK_EVERY == 0:
            watch(row)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for structure, rows in structures.items():
        for path, kind in structure:
            counts[path][kind] += len(rows)
    common = {path: kinds.most_common(1)[0][0] for path, kinds in counts.items()}
    for structure, rows in structures.items():
        if odd := sorted((path, kind) for path, kind in structure if kind != common[path]):
            path, kind = odd[0]
            bad_rows |= dict.fromkeys(rows, f"{path.lstrip('.')} is {kind}, in most rows {common[path]}")
    return dict(sorted(bad_rows.items()))


def parse_line(line: bytes) -> tuple[Any, str | None]:
    """Give the JSON object of a line, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"broken UTF-8: {error.reason}"
    except ValueError as error:
        return None, f"broken JSON: {error}"
    except RecursionError:
        return None, "broken JSON: nested too deep"
    return value, fault_of_row(value, may_hold_halves=b"\\u" in line)


def fault_of_row(value: Any, *, may_hold_halves: bool = True) -> str | None:
    """Say what is wrong with a row of JSON.

    Args:
        value: the row.
        may_hold_halves: look for half of a surrogate pair, which an escape can write and no tokenizer takes.
    """
    if not isinstance(value, dict):
        return f"not a JSON object but {_kind(value)}"
    try:
        if may_hold_halves:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "broken Unicode escape"
    return None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _kinds(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Give the kind of every value inside; null goes with every kind."""
    if value is None:
        return
    yield path, _kind(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{path}[]")

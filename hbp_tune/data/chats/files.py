"""Files of rows, of whatever kind, as rows by number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from numpy.typing import NDArray

from hbp_tune.config.sources import DATA_SUFFIXES
from hbp_tune.data.chats.json_lines import is_json_lines, numbered_lines
from hbp_tune.data.chats.line_files import ArrayRows, LineFiles
from hbp_tune.errors import ConfigError


class Rows(Protocol):
    """Rows by number, as mappings of columns to values."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Chosen:
    """Some rows of others."""

    def __init__(self, rows: Rows, indices: NDArray[np.int64]) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._rows[int(self._indices[index])]


class _WithoutNulls:
    """Rows of a table, without the keys that Arrow filled in: all rows of a column have the same ones there.

    So a schema's ``default: null`` goes, too, which only JSON lines can keep.
    """

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        return _without_nulls(self._table[index])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def open_rows(files: Sequence[Path], source: str | None, split: str, arguments: Mapping[str, Any]) -> Rows:
    """Open the rows of local files, or of a source that is none.

    Args:
        files: of one kind.
        source: a name on the hub, or a folder written by ``save_to_disk``; without files.
        split: of the rows.
        arguments: for ``datasets.load_dataset``.

    Raises:
        ConfigError: there is nothing, it cannot be read, or it is of several kinds.
    """
    if not files and not source:
        raise ConfigError("dataset: neither data_files nor source is set; name files, or a data set on the hub")
    if not files:
        return _WithoutNulls(_load(str(source), split, arguments))
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"dataset: data_files are of several kinds ({', '.join(sorted(kinds))}); make a list of data sets of them"
        )
    (kind,) = kinds
    if kind == "json" and arguments:  # nothing else would say so: they are not handed to a loader
        raise ConfigError(f"dataset: ChatDataset has no argument {', '.join(arguments)}, nor does reading JSON take any")
    if kind != "json":
        names = [str(file) for file in files]
        return _WithoutNulls(_load(kind, split, {**arguments, "data_files": {_name(split): names}}))
    kinds_of_json = {is_json_lines(file) for file in files if next(numbered_lines(file), None)}
    if len(kinds_of_json) > 1:
        raise ConfigError("dataset: some data_files are JSON lines and others arrays; make a list of data sets of them")
    rows: Rows
    if False in kinds_of_json:
        rows = ArrayRows([file for file in files if not is_json_lines(file)])
    else:
        rows = LineFiles(files, Path(datasets.config.HF_DATASETS_CACHE) / "hbp_tune")
    return _split(rows, split)


def _kind(file: Path) -> str:
    """Name the kind of a file as ``load_dataset`` does.

    Raises:
        ConfigError: it is none that is read.
    """
    name = file.name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise ConfigError(f"dataset: data file {file} must end in {', '.join(DATA_SUFFIXES)} (JSON also in .gz)")
    return "json" if suffix.startswith(".json") else suffix[1:]


def _load(source: str, split: str, arguments: Mapping[str, Any]) -> datasets.Dataset:
    """Load by ``datasets``.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if is_saved(source):
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[_name(split)]
            kept = _indices(split, len(loaded))
            return loaded if kept is None else loaded.select(kept)
        return datasets.load_dataset(source, split=split, **arguments)
    except Exception as error:  # whatever the loader of some format raises
        raise ConfigError(
            f"dataset: {source} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def is_saved(folder: str) -> bool:
    """Tell whether a folder was written by ``save_to_disk`` of ``datasets``."""
    return any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _name(split: str) -> str:
    return split.split("[")[0]


def _indices(split: str, num_rows: int) -> NDArray[np.int64] | None:
    """Give the rows of a split such as ``train[:100]``, ``train[10%:20%]``; None where it is all of them.

    Raises:
        ConfigError: it is not a split.
    """
    if "[" not in split and "+" not in split:
        return None
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({_name(split): num_rows})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"dataset: split={split} is not a part of {num_rows} rows: {error}") from error
    return np.concatenate([np.arange(part.from_, part.to) for part in parts])


def _split(rows: Rows, split: str) -> Rows:
    """Give the rows of a split of local files, all of which are its ``train``.

    Raises:
        ConfigError: it is another one.
    """
    if {_name(part) for part in split.split("+")} != {"train"}:
        raise ConfigError(
            f"dataset: split={split}: local files of JSON have the split 'train' alone, or parts of it: train[:100]"
        )
    kept = _indices(split, len(rows))
    return rows if kept is None else _Chosen(rows, kept)

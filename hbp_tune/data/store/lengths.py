"""Token counts from a file: planning needs no more of the data than that."""

import contextlib
import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.csv import ConvertOptions, ParseOptions, read_csv
from pyarrow.parquet import ParquetFile

from hbp_tune.errors import DataError

_MOST_TOKENS = 2**31 - 1
# What lengths are usually called; the first of these that is there is taken.
_COLUMNS = ("num_tokens", "n_tokens", "length", "lengths", "tokens")
_CLASS_COLUMN = "source"
_MOST_CLASSES = 2**15 - 1
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
LENGTH_SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npy")


def read_lengths(path: Path, column: str | None = None) -> tuple[NDArray[np.int32], NDArray[np.int16] | None]:
    """Read the tokens of each sample from a ``.csv``, ``.csv.gz``, ``.parquet`` or ``.npy`` file.

    Args:
        path: a table with a column of lengths, or one array of whole numbers.
        column: of the table; by default the first of num_tokens, n_tokens, length, lengths and tokens that is there.

    Returns:
        Lengths, ``int32[n]``, and the class of each sample by the table's column ``source``, ``int16[n]``, numbered in the
        order of appearance. Without that column, or with more sources than 16 bits number, there are no classes.

    Raises:
        DataError: there is no such file or column, it cannot be read, or a value is not a whole number of 1 to 2**31 - 1.
    """
    if path.is_dir():
        raise DataError(f"lengths file {path} is a folder; name a file in it")
    if not path.is_file():
        raise DataError(f"lengths file {path} does not exist (looked from {Path.cwd()})")
    name = path.name.lower()
    if not name.endswith(LENGTH_SUFFIXES):
        raise DataError(f"lengths file {path} must end in {', '.join(LENGTH_SUFFIXES)}")
    if name.endswith(".npy"):
        return _read_npy(path), None
    table, column = (_read_parquet if name.endswith(".parquet") else _read_csv)(path, column)
    lengths = _whole_numbers(table.column(column), f"lengths file {path}, column {column!r}")
    return lengths, _classes(table.column(_CLASS_COLUMN)) if _CLASS_COLUMN in table.column_names else None


def whole_lengths(values: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
    """Give numbers as lengths, ``int32[n]``; values are a list, an array or a column.

    Raises:
        DataError: there is none, or one is not a whole number of 1 to 2**31 - 1.
    """
    try:
        column = pa.chunked_array([pa.array(values)])
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"lengths are not a row of numbers: {error}") from error
    return _whole_numbers(column, "lengths")


def _read_npy(path: Path) -> NDArray[np.int32]:
    """Read one array of whole numbers.

    Raises:
        DataError: the file holds something else.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"lengths file {path} is not an array that numpy can read: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iu":
        found = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else "several arrays"
        raise DataError(f"lengths file {path} holds {found}; save one row of whole numbers, int32[n]")
    return _in_range(values, f"lengths file {path}")


def _read_parquet(path: Path, column: str | None) -> tuple[pa.Table, str]:
    """Read the columns that matter, and say which one holds the lengths.

    Raises:
        DataError: the file is not a table, or has no such column.
    """
    try:
        with ParquetFile(path) as file:
            column = _choose_column(file.schema_arrow.names, column, path)
            return file.read(_wanted(file.schema_arrow.names, column)), column
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"lengths file {path} is not a table in Parquet: {error}") from error


def _read_csv(path: Path, column: str | None) -> tuple[pa.Table, str]:
    """Read the columns that matter, and say which one holds the lengths.

    Raises:
        DataError: the file is not a table, or has no such column.
    """
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
            head = stream.readline()
        names = next(csv.reader(io.StringIO(head.decode("utf-8-sig"))), [])
        column = _choose_column(names, column, path)
        return _parse_csv(path, names, column), column
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"lengths file {path} is not a table in CSV: {error}") from error


def _parse_csv(path: Path, names: Sequence[str], column: str) -> pa.Table:
    # In a table of one column an empty line is a sample without a length.
    parse = ParseOptions(ignore_empty_lines=len(names) > 1)

    def read(kind: pa.DataType) -> pa.Table:
        convert = ConvertOptions(include_columns=_wanted(names, column), column_types={_CLASS_COLUMN: pa.string(), column: kind})
        return read_csv(path, parse_options=parse, convert_options=convert)

    for kind in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):
            return read(kind)
    return read(pa.string())  # what is not a number stays text, so that its row can be named


def _choose_column(names: Sequence[str], column: str | None, path: Path) -> str:
    """Give the column that holds the lengths.

    Raises:
        DataError: there is none.
    """
    if not names:
        raise DataError(f"lengths file {path} is empty; its first line must name the columns, such as num_tokens")
    for name in _COLUMNS if column is None else (column,):
        if name in names:
            return name
    wanted = f"none of the columns {', '.join(_COLUMNS)}" if column is None else f"no column {column!r}"
    raise DataError(f"lengths file {path} has {wanted}; it has {', '.join(names)}. Name one by lengths_column")


def _wanted(names: Sequence[str], column: str) -> list[str]:
    return [column, *({_CLASS_COLUMN} & set(names) - {column})]


def _whole_numbers(column: pa.ChunkedArray, where: str) -> NDArray[np.int32]:
    """Give a column as lengths.

    Raises:
        DataError: a value is blank, text, a fraction or out of range, or the column holds something else.
    """
    blank = "blank or NaN; every sample needs its number of tokens"
    if not len(column):
        raise DataError(f"{where}: there is no row")
    if column.null_count:
        raise DataError(f"{where}: row {pc.index(pc.is_null(column), True).as_py()} is {blank}")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        row = pc.index(pc.match_substring_regex(column, _NUMBER), False).as_py()
        if row >= 0:
            text = column[row].as_py()
            raise DataError(f"{where}: row {row} is {f'{text!r}, which is not a number' if text.strip() else blank}")
        column = pc.cast(pc.utf8_trim_whitespace(column), pa.float64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DataError(f"{where} holds {column.type}, not the number of tokens of each sample; name another by lengths_column")
    values = column.to_numpy()
    if values.dtype.kind == "f":
        is_wrong = np.isnan(values) | (values != np.trunc(values))
        if is_wrong.any():
            row = int(np.argmax(is_wrong))
            raise DataError(f"{where}: row {row} is {blank if np.isnan(values[row]) else f'{values[row]}, no whole number'}")
    return _in_range(values, where)


def _in_range(values: NDArray[Any], where: str) -> NDArray[np.int32]:
    """Give whole numbers as lengths.

    Raises:
        DataError: there is none, or one is below 1 or over 2**31 - 1.
    """
    if not len(values):
        raise DataError(f"{where}: there is no row")
    if values.min() < 1:
        row = int(np.argmax(values < 1))
        raise DataError(f"{where}: row {row} is {values[row]}, a sample has at least 1 token; remove the row")
    if values.max() > _MOST_TOKENS:
        row = int(np.argmax(values > _MOST_TOKENS))
        raise DataError(f"{where}: row {row} is {values[row]}, more than {_MOST_TOKENS} tokens; is it a length?")
    return values.astype(np.int32)


def _classes(column: pa.ChunkedArray) -> NDArray[np.int16] | None:
    """Number the different values of a column in the order of appearance; a missing value is a class, too."""
    encoded = column.dictionary_encode(null_encoding="encode").unify_dictionaries()
    if len(encoded.chunk(0).dictionary) > _MOST_CLASSES:
        return None
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int16)

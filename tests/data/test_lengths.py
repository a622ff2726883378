import gzip
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.csv import write_csv
from pyarrow.parquet import write_table

from hbp_tune.data.store.lengths import read_lengths
from hbp_tune.errors import DataError


def written(folder: Path, text: str, name: str = "lengths.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def message(path: Path, column: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_lengths(path, column)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_table_in_any_format_gives_the_same(tmp_path: Path) -> None:
    text = "source,n_tokens\ncode,5\nchat,3\ncode,7\n"
    table = pa.table({"source": ["code", "chat", "code"], "n_tokens": [5, 3, 7]})
    write_table(table, tmp_path / "lengths.parquet")
    paths = [written(tmp_path, text), written(tmp_path, text, "lengths.CSV.gz"), tmp_path / "lengths.parquet"]
    for path in paths:
        lengths, classes = read_lengths(path)
        assert classes is not None
        assert (lengths.tolist(), lengths.dtype) == ([5, 3, 7], np.int32)
        assert (classes.tolist(), classes.dtype) == ([0, 1, 0], np.int16)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint64, ">i4"])
def test_an_array(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "lengths.npy", np.array([4, 1, 9], dtype=dtype))
    lengths, classes = read_lengths(tmp_path / "lengths.npy")
    assert classes is None
    assert (lengths.tolist(), lengths.dtype) == ([4, 1, 9], np.int32)


def test_the_column_is_the_first_of_the_usual_names_or_the_one_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "row,tokens,length,n_tokens\n0,9,8,7\n")
    assert read_lengths(path)[0].tolist() == [7]
    assert read_lengths(path, "tokens")[0].tolist() == [9]
    assert read_lengths(written(tmp_path, "tokens,length\n9,8\n"))[0].tolist() == [8]
    assert read_lengths(written(tmp_path, 'num_tokens,"a, b"\n6,x\n'))[0].tolist() == [6]


def test_what_spreadsheets_do_to_a_file(tmp_path: Path) -> None:
    assert read_lengths(written(tmp_path, "\ufeffn_tokens\r\n 5\r\n7 \r\n"))[0].tolist() == [5, 7]
    assert read_lengths(written(tmp_path, "n_tokens,x\n5.0,1\n7.0,1\n"))[0].tolist() == [5, 7], "whole all the same"
    assert read_lengths(written(tmp_path, "n_tokens,x\n5,1\n\n7,1\n\n"))[0].tolist() == [5, 7]


def test_a_sample_without_source_is_a_class_of_its_own(tmp_path: Path) -> None:
    table = pa.table({"source": ["a", None, "b", "a"], "n_tokens": [1, 1, 1, 1]})
    write_table(table, tmp_path / "lengths.parquet", row_group_size=1)
    classes = read_lengths(tmp_path / "lengths.parquet")[1]
    assert classes is not None
    assert classes.tolist() == [0, 1, 2, 0]
    csv_classes = read_lengths(written(tmp_path, "source,n_tokens\n7,1\nb,1\n,1\n7,1\n"))[1]
    assert csv_classes is not None
    assert csv_classes.tolist() == [0, 1, 2, 0]


def test_too_many_sources_are_no_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "source,n_tokens\n" + "".join(f"https://{i},1\n" for i in range(2**15)))
    assert read_lengths(path)[1] is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("n_tokens\n5\n0\n", "column 'n_tokens': row 1 is 0, a sample has at least 1 token"),
        ("n_tokens\n5\n-3\n0\n", "row 1 is -3, a sample has at least 1 token"),
        ("n_tokens\n5\n2147483648\n", "row 1 is 2147483648, more than 2147483647 tokens"),
        ("n_tokens\n5\n99999999999999999999\n", "row 1 is 1e+20, more than 2147483647 tokens"),
        ("n_tokens\n5\ninf\n", "row 1 is inf, more than 2147483647"),
        ("n_tokens\n5\n7.5\n", "row 1 is 7.5, no whole number"),
        ("n_tokens\n5\nnan\n", "row 1 is blank or NaN"),
        ("n_tokens\n5\n\n6\n", "row 1 is blank or NaN"),
        ("n_tokens,x\n5,1\n,1\n", "row 1 is blank or NaN"),
        ("n_tokens,x\n5.5,1\n,1\n", "row 1 is blank or NaN"),
        ("n_tokens\n5\nmany\n", "row 1 is 'many', which is not a number"),
        ("n_tokens\n5\n7.5\n3 k\n", "row 2 is '3 k', which is not a number"),
        ("n_tokens\n", "there is no row"),
        ("", "is empty; its first line must name the columns"),
        ("\n", "is empty; its first line must name the columns"),
        ("a,b\n1,2\n", "has none of the columns num_tokens, n_tokens, length, lengths, tokens; it has a, b. Name one by"),
        ("12\n13\n", "it has 12"),
        ("n_tokens,x\n1,2\n3\n", "is not a table in CSV: CSV parse error: Expected 2 columns, got 1"),
    ],
)
def test_what_is_wrong_in_a_csv_is_said_with_row_and_value(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in message(written(tmp_path, text))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, "n_tokens,x\n1,2\n")
    assert "has no column 'n_toks'; it has n_tokens, x. Name one by lengths_column" in message(path, "n_toks")
    write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    assert "has none of the columns num_tokens, n_tokens, length, lengths, tokens; it has x" in message(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([5, None], "row 1 is blank or NaN"),
        ([5.0, 2.5], "row 1 is 2.5, no whole number"),
        ([5.0, float("nan")], "row 1 is blank or NaN"),
        ([5, 2**40], f"row 1 is {2**40}, more than"),
        ([[1, 2], [3]], "holds list<element: int64>, not the number of tokens"),
        (["5", "six"], "row 1 is 'six', which is not a number"),
        (["5", " "], "row 1 is blank or NaN"),
        ([True], "holds bool"),
        (pa.array([], pa.int64()), "there is no row"),
    ],
)
def test_what_is_wrong_in_a_parquet_file(tmp_path: Path, values: list[object], wanted: str) -> None:
    write_table(pa.table({"tokens": values}), tmp_path / "lengths.parquet")
    assert wanted in message(tmp_path / "lengths.parquet")


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.array([[1, 2]]), r"holds int64[1, 2]; save one row of whole numbers"),
        (np.array([1.0]), "holds float64[1]; save one row"),
        (np.array(5), "holds int64[]; save one row"),
        (np.array(["5"]), "holds <U1[1]; save one row"),
        (np.array([], dtype=np.int32), "there is no row"),
        (np.array([3, 0]), "row 1 is 0, a sample has at least 1 token"),
        (np.array([3, 2**64 - 1], dtype=np.uint64), "row 1 is 18446744073709551615, more than"),
    ],
)
def test_what_is_wrong_in_an_array(tmp_path: Path, array: np.ndarray, wanted: str) -> None:
    np.save(tmp_path / "lengths.npy", array)
    assert wanted in message(tmp_path / "lengths.npy")


@pytest.mark.parametrize("name", ["lengths.npy", "lengths.parquet", "lengths.csv.gz", "lengths.csv"])
def test_a_file_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\xff no lengths")
    assert " is not a" in message(tmp_path / name)


def test_no_file_and_other_suffixes(tmp_path: Path) -> None:
    assert f"does not exist (looked from {Path.cwd()})" in message(tmp_path / "none.csv")
    assert "is a folder; name a file in it" in message(tmp_path)
    assert message(written(tmp_path, "5", "lengths.txt")).endswith("must end in .csv, .csv.gz, .parquet, .npy")


def test_numbers_kept_as_text_are_numbers(tmp_path: Path) -> None:
    write_table(pa.table({"tokens": [" 5", "7.0"]}), tmp_path / "lengths.parquet")
    assert read_lengths(tmp_path / "lengths.parquet")[0].tolist() == [5, 7]


@pytest.mark.slow
def test_ten_million_rows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 131072, 10**7).astype(np.int32)
    np.save(tmp_path / "lengths.npy", lengths)
    write_table(pa.table({"length": lengths}), tmp_path / "lengths.parquet")
    write_csv(pa.table({"length": lengths}), tmp_path / "lengths.csv")
    for name, most_s in (("lengths.npy", 2), ("lengths.parquet", 4), ("lengths.csv", 15)):
        start = time.perf_counter()
        assert np.array_equal(read_lengths(tmp_path / name)[0], lengths)
        assert time.perf_counter() - start < most_s

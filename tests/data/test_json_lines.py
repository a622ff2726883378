import gzip
import json
from pathlib import Path

import pytest

from hbp_tune.data.chats.json_lines import clean, find_bad_rows, is_json_lines, numbered_lines
from hbp_tune.errors import DataError

GOOD = b'{"id": 1, "text": "x"}'


def no_watch(progress: int) -> None:
    """Take no notice."""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": 1', r"broken JSON: Expecting ',' delimiter: line 1 column 9 (char 8)"),
        (b'{"text": "\xff"}', "broken UTF-8: invalid start byte"),
        (rb'{"text": "\ud800"}', "broken Unicode escape"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b'"x"', "not a JSON object but text"),
        (b"[" * 100_000, "broken JSON: nested too deep"),
    ],
)
def test_lines_that_cannot_be_parsed(line: bytes, reason: str) -> None:
    for same_types in (False, True):
        assert find_bad_rows([GOOD, line, GOOD], same_types=same_types, watch=no_watch) == {1: reason}


def test_types_are_those_of_most_lines() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "x"}], "n": 1, "b": True},
        {"messages": [{"role": "user", "content": None}], "n": 1.5},
        {"messages": "x", "n": 1},
        {"messages": [{"role": "user", "content": 5}], "n": None},
        {"messages": [{"role": "user", "content": "x"}, "y"], "n": 1, "b": None},
        {"messages": [], "other": {"deep": [1]}},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    assert find_bad_rows(lines, same_types=False, watch=no_watch) == {}
    assert find_bad_rows(lines, same_types=True, watch=no_watch) == {
        2: "messages is text, in most rows a list",
        3: "messages[].content is a number, in most rows text",
        4: "messages[] is text, in most rows an object",
    }


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + GOOD + b"\r\n \t\n\n" + GOOD)
    assert [number for number, _ in numbered_lines(tmp_path / "a.jsonl")] == [2, 5]


@pytest.mark.parametrize(
    ("name", "content", "is_lines"),
    [
        ("a.jsonl", GOOD, True),
        ("a.json", b"\n" + GOOD, True),
        ("a.JSONL.gz", gzip.compress(GOOD, mtime=0), True),
        ("a.json", b"", True),
        ("a.parquet", GOOD, False),
        ("a.json", b' [{"id": 1}]', False),
        ("a.json", b'\xef\xbb\xbf[{"id": 1}]', False),
        ("a.json", b'[\n{"id": 1}\n]', False),
        ("a.json", b'{\n"data": [{"id": 1}]}', False),
        ("a.json", b'{"data": [\n{"id": 1}\n]}', False),
        ("a.json", b'{"data": [{"id": 1}]}', False),
        ("a.jsonl", b'{"messages": [{"id": 1}]}', True),
        ("a.jsonl", b'["bad"]\n' + GOOD, True),
        ("a.jsonl", b"broken\n" + GOOD, True),
        ("a.jsonl", b'{"id": \n' + GOOD, True),
    ],
)
def test_what_holds_json_lines(tmp_path: Path, name: str, content: bytes, is_lines: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_json_lines(tmp_path / name) == is_lines


def test_a_copy_without_bad_lines_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb") as stream:
        stream.write(b"\xef\xbb\xbf" + GOOD + b"\nbroken\n\n" + GOOD.replace(b"1", b"2"))
    cleaned = clean(file, "digest", tmp_path / "stores", same_types=False, watch=no_watch)
    assert [json.loads(line.decode("utf-8-sig"))["id"] for line in cleaned.path.read_bytes().splitlines()] == [1, 2]
    assert cleaned.rows.tolist() == [0, 2]
    assert cleaned.bad_rows == {1: "broken JSON: Expecting value: line 1 column 1 (char 0)"}
    file.write_bytes(b"")
    again = clean(file, "digest", tmp_path / "stores", same_types=False, watch=no_watch)
    assert (again.path, again.rows.tolist(), again.bad_rows) == (cleaned.path, [0, 2], cleaned.bad_rows)


def test_a_file_without_bad_lines_is_its_own_copy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    cleaned = clean(tmp_path / "a.jsonl", "digest", tmp_path / "stores", same_types=True, watch=no_watch)
    assert (cleaned.path, cleaned.rows.tolist(), cleaned.bad_rows) == (tmp_path / "a.jsonl", [0], {})


def test_a_compressed_file_that_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD * 1000)[:-20])
    with pytest.raises(DataError, match=rf"data file {file} is not a whole gzip file: .*; copy it again"):
        list(numbered_lines(file))

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_tune.components import open_token_store, store_key
from hbp_tune.components.planning.errors import DataError
from tests.helpers import RandomTokens


class Rows:
    """A data set of given rows; a row that is an exception is raised."""

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        tokens, labels = self.rows[index]
        return {"tokens": tokens, "labels": labels}


FIRST = Rows(([5, 6, 7], [-100, 6, 7]), ([8], [8]))
SECOND = Rows(([1, 2, 3, 4], [1, -100, -100, 4]))


def test_samples_of_all_data_sets_in_order(tmp_path: Path) -> None:
    store = open_token_store([FIRST, SECOND], tmp_path / "store", is_builder=True)
    assert store.lengths.tolist() == [3, 1, 4]
    assert store.sources.tolist() == [0, 0, 1]
    # The first token of a sample is never predicted.
    assert store.num_targets_within(100).tolist() == [2, 0, 1]
    tokens, is_target = store.read(np.array([2, 0]), np.array([4, 3]))
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert is_target.tolist() == [True, False, False, True, False, True, True]


def test_cut_samples_count_the_targets_that_are_left(tmp_path: Path) -> None:
    store = open_token_store([FIRST, SECOND], tmp_path / "store", is_builder=True)
    assert store.num_targets_within(3).tolist() == [2, 0, 0]
    assert store.num_targets_within(2).tolist() == [1, 0, 0]
    tokens, _ = store.read(np.array([0, 2]), np.array([2, 1]))
    assert tokens.tolist() == [5, 6, 1]


def test_reading_no_sample_gives_nothing(tmp_path: Path) -> None:
    store = open_token_store([FIRST], tmp_path / "store", is_builder=True)
    tokens, is_target = store.read(np.array([], dtype=np.int32), np.array([], dtype=np.int32))
    assert len(tokens) == len(is_target) == 0


def test_tokenising_in_parallel_gives_the_same_store(tmp_path: Path) -> None:
    source = RandomTokens([3 + i % 7 for i in range(1200)], 50, seed=1)
    one = open_token_store([source], tmp_path / "one", is_builder=True, num_processes=1)
    two = open_token_store([source], tmp_path / "two", is_builder=True, num_processes=2)
    assert one.fingerprint == two.fingerprint
    assert one.lengths.tolist() == two.lengths.tolist() == source.lengths
    for ids in (np.array([0, 599, 600, 1199]),):
        assert two.read(ids, two.lengths[ids])[0].tolist() == [t for i in ids for t in source[int(i)]["tokens"]]


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    base = open_token_store([FIRST], tmp_path / "a", is_builder=True).fingerprint
    assert open_token_store([Rows(*FIRST.rows)], tmp_path / "b", is_builder=True).fingerprint == base
    other_token = Rows(([5, 6, 9], [-100, 6, 9]), FIRST.rows[1])
    other_mask = Rows(([5, 6, 7], [-100, -100, 7]), FIRST.rows[1])
    other_cut = Rows(([5, 6], [-100, 6]), ([7, 8], [7, 8]))
    for name, changed in (("c", other_token), ("d", other_mask), ("e", other_cut)):
        assert open_token_store([changed], tmp_path / name, is_builder=True).fingerprint != base


def test_a_finished_store_is_not_made_again(tmp_path: Path) -> None:
    made = open_token_store([FIRST], tmp_path / "store", is_builder=True)
    broken = Rows(ValueError("must not be read"), ValueError("must not be read"))
    assert open_token_store([broken], tmp_path / "store", is_builder=True).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            Rows(FIRST.rows[0], KeyError("messages")),
            r"row 1 of data set 1 is no conversation .*KeyError: 'messages'.*conversation_column",
        ),
        (Rows(([1, 2], [1, 3])), r"row 0 of data set 1: labels must equal tokens or be -100"),
        (Rows(([1, 2], [1])), r"row 0 of data set 1: labels must equal tokens or be -100"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing_behind(tmp_path: Path, rows: Rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_token_store([FIRST, rows], tmp_path / "store", is_builder=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_builder", [True, False])
def test_no_row_at_all(tmp_path: Path, is_builder: bool) -> None:
    with pytest.raises(DataError, match=r"the data set is empty: it has no row"):
        open_token_store([Rows(), Rows()], tmp_path / "store", is_builder=is_builder)


def test_key_follows_settings_and_file_content(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("one")
    key = store_key([{"source": "json"}], [file])
    assert store_key([{"source": "json"}], [file]) == key
    assert store_key([{"source": "csv"}], [file]) != key
    file.write_text("two")
    assert store_key([{"source": "json"}], [file]) != key


def test_a_killed_builder_leaves_no_store_that_counts(tmp_path: Path) -> None:
    script = (
        "import time\nfrom pathlib import Path\nfrom hbp_tune.components import open_token_store\n"
        "class Slow:\n"
        "    def __len__(self): return 100000\n"
        "    def __getitem__(self, i):\n"
        "        print('row', flush=True); time.sleep(0.01); return {'tokens': [1], 'labels': [1]}\n"
        f"open_token_store([Slow()], Path({str(tmp_path / 'store')!r}), is_builder=True, num_processes=1)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        os.kill(builder.pid, signal.SIGKILL)
    assert not (tmp_path / "store").exists()
    assert len(open_token_store([FIRST], tmp_path / "store", is_builder=True)) == 2

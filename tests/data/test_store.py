from pathlib import Path

import numpy as np
import pytest

from hbp_tune.data.store.rows import NO_TARGET, BadRow
from hbp_tune.data.store.store import Builder, digest_files, open_token_store, store_key
from hbp_tune.errors import DataError
from tests.data.sources import Rows
from tests.helpers import RandomTokens

FIRST = Rows(([5, 6, 7], [-100, 6, 7]), ([8, 9], [8, 9]))
SECOND = Rows(([1, 2, 3, 4], [1, -100, -100, 4]))


def test_samples_of_all_data_sets_in_order(tmp_path: Path) -> None:
    store = open_token_store([FIRST, SECOND], tmp_path / "store")
    assert len(store) == 3
    assert store.lengths.tolist() == [3, 2, 4]
    assert store.sources.tolist() == [0, 0, 1]
    assert store.rows.tolist() == [0, 1, 0]
    assert (store.lengths.dtype, store.sources.dtype, store.rows.dtype) == (np.int32, np.int16, np.int32)
    # The first token of a sample is never predicted.
    assert store.num_targets_within(100).tolist() == [2, 1, 1]
    tokens, is_target = store.read(np.array([2, 0]), np.array([4, 3]))
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert is_target.tolist() == [True, False, False, True, False, True, True]


def test_cut_samples_count_the_targets_that_are_left(tmp_path: Path) -> None:
    store = open_token_store([FIRST, SECOND], tmp_path / "store")
    assert store.num_targets_within(3).tolist() == [2, 1, 0]
    assert store.num_targets_within(2).tolist() == [1, 1, 0]
    tokens, _ = store.read(np.array([0, 2]), np.array([2, 1]))
    assert tokens.tolist() == [5, 6, 1]


@pytest.mark.parametrize(
    ("cut", "kept", "num_targets"),
    [
        ("truncate_middle", [*range(20), *range(30, 60)], 10),  # of 50 that are not targets, the 10 in the middle
        ("truncate_start", [0, *range(11, 60)], 10),
        ("truncate_end", list(range(50)), 0),
    ],
)
def test_a_sample_is_cut_as_asked_between_whole_ones(tmp_path: Path, cut: str, kept: list[int], num_targets: int) -> None:
    tokens = list(range(100, 160))
    store = open_token_store([FIRST, Rows((tokens, [-100] * 50 + tokens[50:]))], tmp_path / "store")
    read, is_target = store.read(np.array([0, 2, 1]), np.array([3, 50, 2]), cut)
    assert read.tolist() == [5, 6, 7, *(100 + i for i in kept), 8, 9]
    assert is_target.tolist() == [False, True, True, *(i >= 50 for i in kept), True, True]
    assert store.num_targets_within(50, cut).tolist() == [2, 1, num_targets]


def test_reading_no_sample_gives_nothing(tmp_path: Path) -> None:
    store = open_token_store([FIRST], tmp_path / "store")
    tokens, is_target = store.read(np.array([], dtype=np.int32), np.array([], dtype=np.int32))
    assert len(tokens) == len(is_target) == 0


def test_who_builds_does_not_matter(tmp_path: Path) -> None:
    source = RandomTokens([3 + i % 7 for i in range(1200)], 50, seed=1)
    one = open_token_store([source], tmp_path / "one", Builder(num_processes=1, show_progress=False))
    two = open_token_store([source], tmp_path / "two", Builder(num_processes=2, first=0.7, show_progress=False))
    assert one.fingerprint == two.fingerprint
    assert one.lengths.tolist() == two.lengths.tolist() == source.lengths
    assert two.rows.tolist() == list(range(1200))
    ids = np.array([0, 239, 240, 1199])
    assert two.read(ids, two.lengths[ids])[0].tolist() == [t for i in ids for t in source[int(i)]["tokens"]]


def test_bad_rows_leave_gaps_and_are_noted(tmp_path: Path) -> None:
    bad = Rows(FIRST.rows[0], KeyError("x"), ([1, 2], [-100, -100]), FIRST.rows[1])
    store = open_token_store([SECOND, bad], tmp_path / "store")
    assert store.lengths.tolist() == [4, 3, 2]
    assert store.sources.tolist() == [0, 1, 1]
    assert store.rows.tolist() == [0, 0, 3]
    assert store.bad_rows == (
        BadRow(source=1, row=1, reason="KeyError: 'x'"),
        BadRow(source=1, row=2, reason=NO_TARGET),
    )
    assert open_token_store([SECOND, bad], tmp_path / "store").bad_rows == store.bad_rows
    assert store.fingerprint == open_token_store([SECOND, FIRST], tmp_path / "good").fingerprint, "it is of samples"


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    base = open_token_store([FIRST], tmp_path / "a").fingerprint
    assert open_token_store([Rows(*FIRST.rows)], tmp_path / "b").fingerprint == base
    other_token = Rows(([5, 6, 9], [-100, 6, 9]), FIRST.rows[1])
    other_mask = Rows(([5, 6, 7], [-100, -100, 7]), FIRST.rows[1])
    other_cut = Rows(([5, 6], [-100, 6]), ([7, 8, 9], [7, 8, 9]))
    for name, changed in (("c", other_token), ("d", other_mask), ("e", other_cut)):
        assert open_token_store([changed], tmp_path / name).fingerprint != base


def test_a_finished_store_is_not_made_again(tmp_path: Path) -> None:
    made = open_token_store([FIRST], tmp_path / "store")
    broken = Rows(ValueError("must not be read"), ValueError("must not be read"))
    assert open_token_store([broken], tmp_path / "store").fingerprint == made.fingerprint


def test_no_row_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data set is empty: it has no row"):
        open_token_store([Rows(), Rows()], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_rows_that_are_bad_for_several_reasons_and_none_good(tmp_path: Path) -> None:
    rows = Rows(KeyError("messages"), ([1], [1]))
    message = r"row 0 of dataset\[0\] is not a training sample: KeyError: 'messages', nor are the 1 rows after it. Check the row"
    with pytest.raises(DataError, match=message):
        open_token_store([rows], tmp_path / "store")


def test_the_watch_sees_progress_and_may_end_the_build(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(progress: int) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise DataError("another rank failed")

    source = RandomTokens([200] * 200_000, 50, seed=1)
    with pytest.raises(DataError, match="another rank failed"):
        open_token_store([source], tmp_path / "store", Builder(num_processes=1, watch=watch, show_progress=False))
    assert seen == sorted(seen)


def test_key_follows_settings_and_file_content(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("one")
    key = store_key([{"source": "json"}], digest_files([file]))
    assert store_key([{"source": "json"}], digest_files([file])) == key
    assert store_key([{"source": "csv"}], digest_files([file])) != key
    file.rename(tmp_path / "moved.jsonl")
    assert store_key([{"source": "json"}], digest_files([tmp_path / "moved.jsonl"])) == key
    file.write_text("two")
    assert store_key([{"source": "json"}], digest_files([file])) != key

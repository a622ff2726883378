import numpy as np
import pytest

from hbp_tune.planning.plans.packs import Packs, sum_rows
from tests.planning.helpers import array, packs_of, rows_of


def random_rows(seed: int) -> list[list[int]]:
    """Draw packs of 0 to 5 samples; none of the ids comes twice."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, rng.integers(1, 40))
    return [row.tolist() for row in np.split(rng.permutation(int(counts.sum())), np.cumsum(counts)[:-1])]


def test_samples_are_collected_by_pack_in_their_order() -> None:
    packs = Packs.from_places(array(7, 8, 9, 5), np.array([2, 0, 2, 0]), 4)
    assert rows_of(packs) == [[8, 5], [], [7, 9], []]
    assert len(packs) == 4
    assert (packs.ids.dtype.name, packs.offsets.dtype.name) == ("int32", "int64")
    assert rows_of(Packs.from_places(array(), np.array([], dtype=np.int64), 2)) == [[], []]


def test_parts_follow_each_other() -> None:
    joined = Packs.joined([packs_of([3, 1], []), packs_of(), packs_of([2])])
    assert rows_of(joined) == [[3, 1], [], [2]]
    assert (joined.ids.dtype.name, joined.offsets.dtype.name) == ("int32", "int64")
    assert len(Packs.joined([])) == 0
    assert Packs.joined([]).offsets.tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_taken_in_any_order(seed: int) -> None:
    rows = random_rows(seed)
    rng = np.random.default_rng(seed)
    order = rng.integers(0, len(rows), rng.integers(0, 50))
    assert rows_of(packs_of(*rows).take(order))[: len(order)] == [rows[i] for i in order]
    assert len(packs_of(*rows).take(order)) == len(order)


@pytest.mark.parametrize("seed", range(20))
def test_a_span_is_a_slice(seed: int) -> None:
    rows = random_rows(seed)
    first, last = sorted(np.random.default_rng(seed).integers(0, len(rows) + 1, 2).tolist())
    span = packs_of(*rows).span(first, last)
    assert len(span) == last - first
    assert span.offsets[0] == 0
    assert rows_of(span)[: len(span)] == rows[first:last]


def test_padding_adds_empty_packs() -> None:
    assert rows_of(packs_of([4], [2, 3]).padded(4)) == [[4], [2, 3], [], []]
    assert rows_of(packs_of([4]).padded(1)) == [[4]]


@pytest.mark.parametrize("seed", range(20))
def test_sums_equal_the_plain_loop(seed: int) -> None:
    rows = random_rows(seed)
    values = np.random.default_rng(seed).integers(0, 2**40, sum(map(len, rows)))
    assert packs_of(*rows).sums(values).tolist() == [sum(int(values[i]) for i in row) for row in rows]


def test_sums_of_narrow_numbers_are_wide() -> None:
    assert sum_rows(np.full(4, 2**30, dtype=np.int32), np.array([0, 4, 4])).tolist() == [2**32, 0]

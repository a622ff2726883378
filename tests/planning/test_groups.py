import numpy as np
import pytest

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.packing.groups import check_lengths, check_overlong_policy, describe_overlong, group_of_lengths
from hbp_tune.planning.plans.records import PackingGroup

GROUPS = tuple(PackingGroup(name=name, pack_len=n) for name, n in (("a", 8), ("b", 16), ("c", 64)))


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def check_all(lengths: np.ndarray, overlong: str) -> list[int]:
    return check_lengths(lengths, overlong, GROUPS, np.arange(len(lengths), dtype=np.int32)).tolist()


def test_borders_belong_to_the_shorter_group() -> None:
    assert group_of_lengths(array(1, 8, 9, 16, 17, 64, 65), GROUPS).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert group_of_lengths(array(1, 8, 9), GROUPS[:1]).tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_each_sample_gets_the_shortest_group_that_holds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [PackingGroup(name=str(n), pack_len=int(n)) for n in 2 * np.unique(rng.integers(1, 50, rng.integers(1, 6)))]
    lengths = rng.integers(1, 110, 50).astype(np.int32)
    want = [next((i for i, group in enumerate(groups) if length <= group.pack_len), len(groups)) for length in lengths]
    assert group_of_lengths(lengths, groups).tolist() == want


def test_the_overlong_are_found_in_order() -> None:
    assert check_all(array(64, 65, 1, 1000), "drop") == [1, 3]
    assert check_all(array(64, 1), "error") == []
    assert check_all(array(65, 66), "truncate") == [0, 1], "all of them can be cut"


def test_the_overlong_are_described_with_five_rows_at_most() -> None:
    lengths = np.arange(60, 75, dtype=np.int32)
    assert describe_overlong(np.flatnonzero(lengths > 64), lengths, GROUPS[-1]) == (
        "10 of 15 samples are longer than pack_len=64 of the longest group 'c': "
        "the longest has 74 tokens; first rows: 5, 6, 7, 8, 9"
    )


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_no_policy_excuses_empty_data_or_empty_samples(overlong: str) -> None:
    with pytest.raises(PackingError, match=r"the data set is empty: there is no sample to plan; check the data files"):
        check_all(array(), overlong)
    with pytest.raises(PackingError, match=r"sample 2 has 0 tokens, at least 1 is needed; remove the row"):
        check_all(array(100, 5, 0), overlong)


def test_the_error_says_which_sample_which_group_and_the_ways_out() -> None:
    message = (
        r"^sample 1 has 65 tokens, group 'c' holds 64\. 2 of 3 samples are longer .* first rows: 1, 2\. "
        r"Add a longer group, or set planner\.overlong=drop or planner\.overlong=truncate$"
    )
    with pytest.raises(PackingError, match=message):
        check_all(array(64, 65, 66), "error")


def test_only_drawn_samples_count_and_are_named_by_their_ids() -> None:
    lengths, drawn = array(100, 5, 65, 0, 70), array(1, 2, 2, 4)
    assert check_lengths(lengths, "drop", GROUPS, drawn).tolist() == [2, 2, 4]
    with pytest.raises(
        PackingError, match=r"^sample 2 has 65 tokens, .* 2 of 5 samples are longer .* 70 tokens; first rows: 2, 4\."
    ):
        check_lengths(lengths, "error", GROUPS, drawn)
    with pytest.raises(PackingError, match=r"^sample 3 has 0 tokens"):
        check_lengths(lengths, "drop", GROUPS, array(1, 3))
    with pytest.raises(PackingError, match=r"^overlong=drop leaves no sample: 1 of 5 samples"):
        check_lengths(lengths, "drop", GROUPS, array(2, 2))


@pytest.mark.parametrize("overlong", ["Drop", "", "cut"])
def test_other_policies_are_refused(overlong: str) -> None:
    with pytest.raises(ConfigError, match=rf"overlong='{overlong}' must be one of error, drop, truncate"):
        check_overlong_policy(overlong)

import warnings

import numpy as np
import pytest

from hbp_tune.components.planning.curriculum import Interleave, ShortFirst
from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.records import PackingGroup

GROUPS = tuple(PackingGroup(name=name, pack_len=n) for name, n in (("a", 64), ("b", 128), ("c", 256)))


def order(curriculum: Interleave | ShortFirst, step_groups: list[int], first_step: int = 0) -> list[int]:
    return curriculum.order(np.array(step_groups, dtype=np.int16), groups=GROUPS, first_step=first_step).tolist()


def test_interleave_by_hand() -> None:
    positions = order(Interleave(), [0, 0, 0, 2])
    assert [[0, 0, 0, 2][i] for i in positions] == [0, 0, 2, 0]
    assert [i for i in positions if i < 3] == [0, 1, 2], "steps of a group keep their order"


@pytest.mark.parametrize("seed", range(20))
def test_orders_are_permutations_spread_in_proportion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    step_groups = np.sort(rng.integers(0, 3, rng.integers(1, 200))).tolist()
    for curriculum in (Interleave(), ShortFirst(steps=int(rng.integers(0, 20)))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sorted(order(curriculum, step_groups)) == list(range(len(step_groups)))
    trained = np.array(step_groups)[order(Interleave(), step_groups)]
    for group in set(step_groups):
        share = (trained == group).mean()
        counts = np.cumsum(trained == group)
        assert np.abs(counts - share * np.arange(1, len(trained) + 1)).max() <= 2, "never far from its share"


def test_short_first_then_the_rest_in_proportion() -> None:
    step_groups = [0] * 6 + [2] * 3
    trained = [step_groups[i] for i in order(ShortFirst(steps=3), step_groups)]
    assert trained == [0, 0, 0, 0, 2, 0, 2, 0, 2]


def test_steps_count_over_the_run() -> None:
    step_groups = [0] * 6 + [2] * 6
    later = [step_groups[i] for i in order(ShortFirst(steps=10), step_groups, first_step=7)]
    assert later[:3] == [0, 0, 0]
    assert 2 in later[3:5]
    assert order(ShortFirst(steps=10), step_groups, first_step=10) == order(Interleave(), step_groups)


def test_all_groups_up_to_the_limit_are_short() -> None:
    step_groups = [0] * 4 + [1] * 4 + [2] * 4
    trained = [step_groups[i] for i in order(ShortFirst(steps=6, max_pack_len=128), step_groups)]
    assert set(trained[:6]) == {0, 1}


def test_running_out_of_short_steps_warns_and_goes_on() -> None:
    with pytest.warns(UserWarning, match=r"curriculum.steps=9 asks for 9 short steps in this epoch, which has 2"):
        assert sorted(order(ShortFirst(steps=9), [0, 0, 2, 2])) == [0, 1, 2, 3]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"curriculum.steps=-1 must be 0 or more"):
        ShortFirst(steps=-1)
    with pytest.raises(ConfigError, match=r"max_pack_len=32 is shorter than every group; the shortest has pack_len=64"):
        order(ShortFirst(steps=1, max_pack_len=32), [0])


def test_orders_by_hand() -> None:
    step_groups = [0, 0, 0, 0, 2, 2]
    assert order(Interleave(), step_groups) == [0, 4, 1, 2, 5, 3]
    assert order(ShortFirst(steps=0), step_groups) == [0, 4, 1, 2, 5, 3]
    assert order(ShortFirst(steps=2), step_groups) == [0, 1, 2, 4, 3, 5]
    assert order(ShortFirst(steps=5), step_groups, first_step=4) == [0, 1, 4, 2, 5, 3], "one of five is left"
    assert order(Interleave(), [2]) == [0]
    assert order(Interleave(), [0, 1, 2]) == [0, 1, 2], "the shorter group goes first"


def test_no_warning_where_short_steps_are_enough() -> None:
    assert order(ShortFirst(steps=2), [0, 0, 2]) == [0, 1, 2]
    assert order(ShortFirst(steps=9), [0, 0, 2], first_step=7) == [0, 1, 2]


def test_no_warning_where_no_longer_group_follows() -> None:
    assert order(ShortFirst(steps=9, max_pack_len=256), [0, 0, 2]) == [0, 2, 1]

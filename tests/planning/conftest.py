from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.plans.records import PackingGroup

pytest.register_assert_rewrite("tests.planning.helpers")


@pytest.fixture
def two_groups() -> tuple[PackingGroup, ...]:
    return PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2)


@pytest.fixture
def draw_lengths() -> Callable[[int], NDArray[np.int32]]:
    """Draw 1 to 400 lengths, mostly short, at most 256, by a seed."""

    def draw(seed: int) -> NDArray[np.int32]:
        rng = np.random.default_rng(seed)
        short = rng.integers(1, 40, rng.integers(1, 350))
        long = rng.integers(40, 257, rng.integers(0, 50))
        return rng.permutation(np.concatenate((short, long))).astype(np.int32)

    return draw

from collections.abc import Callable

import numpy as np
import pytest
import torch.distributed as dist

from hbp_tune.components.parallel.agree import from_rank_zero
from hbp_tune.components.planning.errors import PackingError
from tests.ranks import RankError, RankPool


def agree_job(fails: bool) -> tuple[int, list[int]]:
    def make() -> np.ndarray:
        if fails:
            raise PackingError("sample 3 is too long")
        return np.arange(3) + 10 * dist.get_rank()

    return dist.get_rank(), from_rank_zero(make).tolist()


def test_all_ranks_get_what_rank_zero_made(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(agree_job, False) == [(0, [0, 1, 2]), (1, [0, 1, 2])]


def test_an_error_of_rank_zero_is_raised_on_every_rank(ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2).run(agree_job, True)
    for rank in (0, 1):
        assert f"rank {rank}: PackingError: sample 3 is too long" in str(caught.value)
    assert ranks(2).run(agree_job, False)[1][1] == [0, 1, 2], "and the ranks go on together"

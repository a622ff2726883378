import time
from collections.abc import Callable

import numpy as np
import pytest
import torch.distributed as dist

from hbp_tune.errors import ConfigError, DataError, PackingError
from hbp_tune.parallel.agree import Watch, from_rank_zero, together
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


def slow_job(seconds: float, timeout_s: float, shows_progress: bool) -> tuple[float, float, int]:
    """Rank 1 works for some seconds; give when each rank's work was done, when it went on, and its result."""
    start = time.monotonic()
    done = start

    def work(watch: Watch) -> int:
        nonlocal done
        while dist.get_rank() == 1 and time.monotonic() < start + seconds:
            watch(int(10 * time.monotonic()) if shows_progress else 0)
            time.sleep(0.02)
        done = time.monotonic()
        return 10 + dist.get_rank()

    result = together(work, name="slow work", timeout_s=timeout_s)
    return done - start, time.monotonic() - start, result


def test_ranks_wait_for_the_slowest_and_keep_their_own_results(ranks: Callable[[int], RankPool]) -> None:
    (first_done, first_on, first), (second_done, _, second) = ranks(2).run(slow_job, 0.6, 60.0, False)
    assert (first, second) == (10, 11)
    assert first_done < 0.3
    assert second_done >= 0.6
    assert first_on >= 0.5


def test_the_time_out_counts_from_the_last_sign_of_progress(ranks: Callable[[int], RankPool]) -> None:
    assert [result for *_, result in ranks(2).run(slow_job, 1.5, 0.7, True)] == [10, 11]
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(2).run(slow_job, 20.0, 0.7, False)
    assert time.monotonic() - start < 5
    message = (
        r"slow work: no rank has made progress for timeout_s=0.7, and ranks [1] are not done; look for their errors, or raise "
        r"timeout_s if one step takes longer"
    )
    for rank in (0, 1):
        assert f"rank {rank}: ConfigError: {message}" in str(caught.value)


class TwoArgumentsError(Exception):
    """Cannot be unpickled: what BaseException keeps is one argument, the message."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row}: {what}")


def failing_job(errors: dict[int, Exception], others_work_s: float) -> None:
    start = time.monotonic()

    def work(watch: Watch) -> None:
        if error := errors.get(dist.get_rank()):
            raise error
        while time.monotonic() < start + others_work_s:
            watch()
            time.sleep(0.02)

    together(work, name="failing work", timeout_s=60.0)


@pytest.mark.parametrize("others_work_s", [0.0, 60.0], ids=["others wait", "others work"])
def test_an_error_of_any_rank_is_raised_soon_on_every_rank(ranks: Callable[[int], RankPool], others_work_s: float) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(2).run(failing_job, {1: DataError("row 7 is bad")}, others_work_s)
    assert time.monotonic() - start < 5
    for rank in (0, 1):
        assert f"rank {rank}: DataError: row 7 is bad" in str(caught.value)
    assert [result for *_, result in ranks(2).run(slow_job, 0.0, 60.0, False)] == [10, 11], "and the ranks go on together"


def test_of_two_errors_every_rank_raises_the_same(ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2).run(failing_job, {0: DataError("mine"), 1: ConfigError("yours")}, 0.0)
    first = [line.split(": ", 1)[1] for line in str(caught.value).splitlines() if line.startswith("rank ")]
    assert first in (["DataError: mine"] * 2, ["ConfigError: yours"] * 2)


def odd_error_job() -> None:
    def work(watch: Watch) -> None:
        if dist.get_rank() == 1:
            raise TwoArgumentsError(3, "is odd")

    together(work, name="odd work", timeout_s=60.0)


def test_an_error_that_cannot_travel_keeps_its_text(ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(RankError, match=r"rank 0: RuntimeError: TwoArgumentsError: row 3: is odd"):
        ranks(2).run(odd_error_job)

"""Pools of ranks: what jobs give comes back, failures with their reason, and soon."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import RankError, RankPool


def sum_job(base: int) -> int:
    total = torch.tensor(base + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("lost")
    dist.barrier()


def die_on_rank_one() -> int:
    if dist.get_rank() == 1:
        os._exit(3)
    return dist.get_rank()


def test_spawned_ranks_find_their_jobs(tmp_path: Path) -> None:
    pool = RankPool(2, tmp_path, start_method="spawn")
    try:
        assert pool.run(sum_job, 10) == [21, 21]
    finally:
        pool.close()


def test_an_error_ends_the_wait_of_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE_S", 0.5)
    pool = RankPool(2, tmp_path)
    with pytest.raises(RankError, match=r"(?s)^rank 1: ValueError: lost\n.*in fail_on_rank_one.*\nrank 0: no answer in time$"):
        pool.run(fail_on_rank_one)


def test_the_end_of_a_process_is_an_error(tmp_path: Path) -> None:
    pool = RankPool(2, tmp_path)
    with pytest.raises(RankError, match=r"^rank 1: ended with exit code 3$"):
        pool.run(die_on_rank_one)
    pool.close()

"""Names of starts: agreed on by the ranks of one start, whatever earlier ones left in the store."""

import contextlib
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hbp_tune.parallel.join import name_of_start


def names(path: Path, ranks: list[int], world_size: int) -> dict[int, str]:
    """Let ranks of a start agree, each by a client of its own; those that are left out died before."""
    found: dict[int, str] = {}

    def ask(rank: int) -> None:
        store = dist.FileStore(str(path), world_size)
        store.set_timeout(timedelta(seconds=1 if len(ranks) < world_size else 60))
        with contextlib.suppress(RuntimeError):  # nobody answers a rank of a start without rank 0
            found[rank] = name_of_start(store, rank, world_size)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_of_a_start_agree_and_starts_differ(tmp_path: Path) -> None:
    starts = [names(tmp_path / "store", [0, 1, 2, 3], 4) for _ in range(3)]
    assert [len(start) for start in starts] == [4, 4, 4]
    assert all(len(set(start.values())) == 1 for start in starts)
    assert len({start[0] for start in starts}) == 3


def test_a_start_that_died_while_asking_does_not_confuse_the_next(tmp_path: Path) -> None:
    assert names(tmp_path / "store", [1, 2], 3) == {}
    agreed = names(tmp_path / "store", [0, 1, 2], 3)
    assert len(agreed) == 3
    assert len(set(agreed.values())) == 1

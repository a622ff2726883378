"""Pools of ranks that use one GPU, where there is one."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import RankPool
from tests.staged_group import join_staged


@pytest.fixture(scope="module")
def staged_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """Give the pool of a world size, whose process groups are staged ones."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            # A spawned rank imports everything again, some seconds of a core, which CUDA alone needs.
            start_method = "spawn" if torch.cuda.is_available() else "fork"
            directory = tmp_path_factory.mktemp("staged")
            pools[world_size] = RankPool(world_size, directory, join=join_staged, start_method=start_method)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()

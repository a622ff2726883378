"""Fixtures that every room's tests share."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """Give the pool of a world size, started when it is first asked for."""
    pools: dict[int, RankPool] = {}
    directory = tmp_path_factory.mktemp("ranks")

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, directory)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()

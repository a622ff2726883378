"""Fixtures that all tests share."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


def pytest_configure() -> None:
    # Compile kernels in the process that asks: a rank that was forked would wait for the helpers of its parent for ever.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


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

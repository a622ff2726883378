"""Fixtures that all tests share."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


def pytest_configure() -> None:
    # Compile kernels in the process that asks: a rank that was forked would wait for the helpers of its parent for ever.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


# What starts processes, in a test's own lines.
_STARTS = {"subprocess", "multiprocessing", "RankPool", "run_ranks", "start_process"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes, which `make check` leaves to `make test`."""
    for item in items:
        names = set(item.function.__code__.co_names) if isinstance(item, pytest.Function) else set()
        if "ranks" in getattr(item, "fixturenames", ()) or names & _STARTS or "gpu" in item.path.parts:
            item.add_marker("processes")


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

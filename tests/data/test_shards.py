import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hbp_tune.data.store.rows import RowReader
from hbp_tune.data.store.shards import ShardBuilders, cut_shards
from hbp_tune.data.store.store import Builder, open_token_store
from hbp_tune.errors import DataError
from hbp_tune.parallel import together
from tests.data.sources import Rows
from tests.helpers import RandomTokens
from tests.ranks import RankError, RankPool


@pytest.mark.parametrize("num_rows", [1, 256, 257, 1000, 65536, 65537, 1_000_000])
def test_shards_cover_all_rows_evenly(num_rows: int, tmp_path: Path) -> None:
    shards = cut_shards(num_rows, tmp_path)
    assert (shards[0].start, shards[-1].stop) == (0, num_rows)
    assert all(left.stop == right.start for left, right in pairwise(shards))
    sizes = [shard.stop - shard.start for shard in shards]
    assert len(shards) <= 256
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(num_rows, 128)


class Noted:
    """Random tokens that note in a file which rows are read, and may wait or die at one."""

    def __init__(self, path: Path, num_rows: int, *, wait_s: float = 0.0, dies_at: int | None = None) -> None:
        self.path, self.wait_s, self.dies_at = path, wait_s, dies_at
        self.rows = RandomTokens([5] * num_rows, 50, seed=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.path.open("a") as stream:
            stream.write(f"{index}\n")
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.wait_s)
        return self.rows[index]

    def read(self) -> list[int]:
        return [int(line) for line in self.path.read_text().split()]


def build_job(directory: Path, num_rows: int) -> tuple[str, int]:
    """Tokenise on every rank with one process; give the fingerprint, and how many rows this rank read."""
    noted = Noted(directory / f"rows_{dist.get_rank()}", num_rows, wait_s=0.0005)

    def work(watch: Callable[[int], None]) -> str:
        builder = Builder(num_processes=1, first=dist.get_rank() / 2, watch=watch, show_progress=False)
        return open_token_store([noted], directory / "store", builder).fingerprint

    return together(work, name="store", timeout_s=60), len(noted.read())


def test_ranks_share_the_shards(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    (first, first_rows), (second, second_rows) = ranks(2).run(build_job, tmp_path, 2048)
    assert first == second
    assert first_rows + second_rows == 2048, "each row once"
    assert min(first_rows, second_rows) >= 256
    alone = RandomTokens([5] * 2048, 50, seed=1)
    assert open_token_store([alone], tmp_path / "alone").fingerprint == first


def failing_job(directory: Path) -> None:
    """One rank has a data set whose rows all fail, the other waits long for each of its own."""
    rows = Rows(*[KeyError("messages")] * 300) if dist.get_rank() else Noted(directory / "rows", 300, wait_s=1.0)

    def work(watch: Callable[[int], None]) -> None:
        builder = Builder(num_processes=1, watch=watch, show_progress=False)
        open_token_store([rows], directory / f"store_{dist.get_rank()}", builder)

    together(work, name="store", timeout_s=60)


def test_an_error_ends_the_build_on_all_ranks(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(2).run(failing_job, tmp_path)
    assert time.monotonic() - start < 20
    for rank in (0, 1):
        assert f"rank {rank}: DataError: row 0 of dataset[0] is not a training sample" in str(caught.value)


def test_a_shard_of_rows_that_all_fail_alike_ends_the_build(tmp_path: Path) -> None:
    rows = Rows(*[ValueError(f"row {i} has no messages") for i in range(5000)])
    message = (
        r"row \d+ of dataset\[0\] is not a training sample: ValueError: row \d+ has no messages, nor are the \d+ rows after it"
    )
    with pytest.raises(DataError, match=message):
        open_token_store([rows], tmp_path / "store", Builder(num_processes=2, show_progress=False))
    assert not list((tmp_path / "store").glob("*.json"))


def test_a_builder_that_is_killed_is_named_and_its_finished_shards_stay(tmp_path: Path) -> None:
    noted = Noted(tmp_path / "rows", 1024, dies_at=700)
    with pytest.raises(DataError, match=r"ended with exit code -9; -9 mostly means that memory ran out"):
        open_token_store([noted], tmp_path / "store", Builder(num_processes=1, show_progress=False))
    assert sorted(path.name for path in (tmp_path / "store").glob("*.json")) == ["000.json", "001.json"]
    noted.dies_at = None
    noted.path.unlink()
    open_token_store([noted], tmp_path / "store")
    assert sorted(noted.read()) == list(range(512, 1024)), "what was done is not done again"


@pytest.mark.slow
def test_a_killed_rank_leaves_its_shard_to_others_and_its_builders_end(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom tests.data.test_shards import Noted\n"
        "from hbp_tune.data.store.store import Builder, open_token_store\n"
        f"noted = Noted(Path({str(tmp_path / 'killed')!r}), 512, wait_s=0.02)\n"
        f"open_token_store([noted], Path({str(tmp_path / 'store')!r}), Builder(num_processes=1))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
        while not (tmp_path / "killed").exists():
            time.sleep(0.05)
            assert killed.poll() is None
        killed.kill()
    noted = Noted(tmp_path / "rows", 512)
    store = open_token_store([noted], tmp_path / "store", Builder(num_processes=1, show_progress=False))
    assert len(store) == 512
    assert set(noted.read()) == set(range(512))


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    shards = cut_shards(2, tmp_path)
    shards[0].aside.mkdir()  # a folder where the table should go
    rows = RowReader([Rows(([1, 2], [1, 2]), ([1, 2], [1, 2]))])

    def build() -> None:
        with ShardBuilders(shards, rows, num_processes=1) as builders:
            while True:
                builders.check()
                time.sleep(0.02)

    with pytest.raises(DataError, match=rf"token store {tmp_path} cannot be written: Is a directory; see token_store_dir"):
        build()

import numpy as np
import pytest

from hbp_tune.components.planning.sharding import local_rows, padded_len


@pytest.mark.parametrize("seed", range(20))
def test_padded_lengths_are_the_least_that_shards_can_have(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        cp_degree = int(rng.integers(1, 9))
        pack_len = 2 * cp_degree * int(rng.integers(1, 200))
        num_tokens = int(rng.integers(0, pack_len + 1))
        fitting = (n for n in range(1, pack_len) if n >= num_tokens and n % (2 * cp_degree) == 0 and n % 128 == 0)
        want = next(fitting, pack_len)
        assert padded_len(num_tokens, cp_degree, pack_len) == want
        assert padded_len(np.array([num_tokens, 0]), cp_degree, pack_len)[0] == want


def test_rows_by_hand() -> None:
    assert [local_rows(384, rank, 3) for rank in range(3)] == [slice(0, 128), slice(128, 256), slice(256, 384)]
    assert local_rows(128, 0, 1) == slice(0, 128)


def test_padding_by_hand() -> None:
    assert [padded_len(n, 1, 1024) for n in (0, 1, 128, 129, 1000, 1024)] == [128, 128, 128, 256, 1024, 1024]
    assert padded_len(np.array([0, 1, 128, 129, 1000, 1024]), 1, 1024).tolist() == [128, 128, 128, 256, 1024, 1024]
    assert padded_len(1, 96, 19200) == 384  # lcm(2 * 96, 128)
    assert padded_len(33, 1, 48) == 48, "never more than the pack's length"
    assert isinstance(padded_len(1, 96, 19200), int)


@pytest.mark.parametrize("cp_degree", [1, 2, 3, 4, 8])
def test_ranks_share_out_all_rows_evenly(cp_degree: int) -> None:
    padded = padded_len(1000, cp_degree, 48 * 1024)
    rows = [list(range(padded))[local_rows(padded, rank, cp_degree)] for rank in range(cp_degree)]
    assert [row for part in rows for row in part] == list(range(padded))
    assert len({len(part) for part in rows}) == 1

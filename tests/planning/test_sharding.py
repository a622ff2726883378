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
        assert padded_len(num_tokens, cp_degree, pack_len) == next(fitting, pack_len)


def test_rows_by_hand() -> None:
    assert [local_rows(384, rank, 3) for rank in range(3)] == [slice(0, 128), slice(128, 256), slice(256, 384)]
    assert local_rows(128, 0, 1) == slice(0, 128)

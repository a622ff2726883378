import numpy as np
import pytest

from hbp_tune.planning.packing.first_fit import FirstFit, first_fit, greedy_fill
from hbp_tune.planning.plans.hashing import hashed_order
from tests.planning.helpers import chat_lengths


def slow_first_fit(lengths: list[int], free: list[int], pack_len: int | None) -> list[int]:
    """Say plainly what first-fit means; without a pack length no pack is opened."""
    place = []
    for length in lengths:
        index = next((i for i, room in enumerate(free) if room >= length), -1)
        if index < 0 and pack_len is not None:
            free.append(pack_len)
            index = len(free) - 1
        if index >= 0:
            free[index] -= length
        place.append(index)
    return place


def test_first_fit_by_hand() -> None:
    assert first_fit(np.array([5, 4, 3, 8, 1], dtype=np.int32), 8).tolist() == [0, 1, 0, 2, 1]
    assert first_fit(np.array([8], dtype=np.int32), 8).tolist() == [0]


def test_greedy_fill_by_hand() -> None:
    taken = greedy_fill(np.array([4, 3, 2, 1, 1], dtype=np.int32), np.array([3, 0, 2]))
    assert taken.tolist() == [-1, 0, 2, -1, -1]


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_equals_the_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pack_len = int(rng.integers(2, 100))
    lengths = rng.integers(1, pack_len + 1, rng.integers(1, 200)).astype(np.int32)
    assert first_fit(lengths, pack_len).tolist() == slow_first_fit(lengths.tolist(), [], pack_len)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_fill_equals_the_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    free = rng.integers(0, 50, rng.integers(1, 40))
    lengths = rng.integers(1, 60, rng.integers(0, 200)).astype(np.int32)
    before = free.copy()
    assert greedy_fill(lengths, free).tolist() == slow_first_fit(lengths.tolist(), free.tolist(), None)
    assert np.array_equal(free, before), "the caller's room is its own"


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_places_shuffled_samples_and_small_ones_last(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [20, 641][seed % 2], rng.integers(1, 300)).astype(np.int32)
    place = FirstFit().place(lengths, 640, seed=seed, epoch=2)
    order = hashed_order(len(lengths), seed=seed, epoch=2, stream="first fit").tolist()
    order = [i for i in order if lengths[i] >= 10] + [i for i in order if lengths[i] < 10]
    assert place[order].tolist() == slow_first_fit(lengths[order].tolist(), [], 640)
    assert set(place.tolist()) == set(range(place.max() + 1)), "packs are numbered without gaps"
    assert np.array_equal(place, FirstFit().place(lengths.copy(), 640, seed=seed, epoch=2))


def test_seeds_and_epochs_draw_other_packs() -> None:
    lengths = chat_lengths(500, 4096)
    places = [FirstFit().place(lengths, 4096, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(place.tolist()) for place in places}) == 9


def test_a_real_mixture_leaves_little_room() -> None:
    lengths = chat_lengths(20_000, 16_384)
    num_packs = [place.max() + 1 for place in (first_fit(lengths, 16_384), FirstFit().place(lengths, 16_384, seed=0, epoch=0))]
    assert lengths.sum() / (num_packs[0] * 16_384) > 0.99
    assert num_packs[1] <= -(-int(lengths.sum()) // 16_384) + 1, "small samples fill what is left"


def test_samples_as_long_as_the_pack_are_alone() -> None:
    # 4096 * 2**20 tokens are more than 32 bits hold.
    assert first_fit(np.full(4096, 2**20, dtype=np.int32), 2**20).tolist() == list(range(4096))


def test_no_sample_and_one_sample() -> None:
    assert FirstFit().place(np.array([], dtype=np.int32), 8, seed=0, epoch=0).tolist() == []
    assert FirstFit().place(np.array([8], dtype=np.int32), 8, seed=0, epoch=0).tolist() == [0]


@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 7, 64, 65])
def test_equal_samples_fill_pack_after_pack(num_samples: int) -> None:
    lengths = np.full(num_samples, 5, dtype=np.int32)
    assert first_fit(lengths, 16).tolist() == [i // 3 for i in range(num_samples)]
    # Just over half: as many packs as first-fit can open for so few tokens.
    assert first_fit(lengths, 9).tolist() == list(range(num_samples))


def test_nothing_to_fill_and_nothing_to_fill_it_with() -> None:
    assert greedy_fill(np.array([], dtype=np.int32), np.array([3, 4])).tolist() == []
    assert greedy_fill(np.array([1, 2], dtype=np.int32), np.array([0, 0, 0])).tolist() == [-1, -1]

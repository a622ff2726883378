from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison import baselines
from hbp_tune.planning.comparison.baselines import BASELINES, ISF
from hbp_tune.planning.packing import first_fit as packing
from hbp_tune.planning.plans.hashing import hashed_order

Draw = Callable[[int], NDArray[np.int32]]

SHUFFLED = ("random", "isf", "first_fit_shuffle", "best_fit_shuffle")
PACK_LEN = 256  # the longest that `draw_lengths` draws


def place(
    name: str, lengths: NDArray[np.int32] | list[int], pack_len: int = PACK_LEN, *, seed: int = 0, epoch: int = 0
) -> NDArray[np.int64]:
    return BASELINES[name]().place(np.asarray(lengths, dtype=np.int32), pack_len, seed=seed, epoch=epoch)


def slow_place(lengths: list[int], pack_len: int, choose: Callable[[list[int]], int]) -> list[int]:
    """Place each sample into the pack whose room `choose` picks among those that suffice; of equal packs into the first."""
    rooms: list[int] = []
    packs = []
    for length in lengths:
        enough = [room for room in rooms if room >= length]
        if not enough:
            rooms.append(pack_len)
        pack = rooms.index(choose(enough)) if enough else len(rooms) - 1
        rooms[pack] -= length
        packs.append(pack)
    return packs


@pytest.fixture
def without_shuffling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the data set's order, so that a reader can follow the samples."""
    for module in (baselines, packing):
        monkeypatch.setattr(module, "hashed_order", lambda num_items, **_: np.arange(num_items))


@pytest.mark.usefixtures("without_shuffling")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [0, 1, 2, 3, 4, 5]),
        ("random", [0, 1, 1, 2, 3, 4]),  # 6 | 7 3 | 4 | 10 | 2
        ("next_fit", [0, 1, 1, 2, 3, 4]),
        ("longalign_packing", [0, 1, 2, 2, 3, 4]),  # 6 | 7 | 3 4 | 10 | 2: only a sample of full length fills its pack
        ("first_fit_shuffle", [0, 1, 0, 2, 3, 1]),  # 6 3 | 7 2 | 4 | 10
        ("best_fit_shuffle", [0, 1, 1, 0, 2, 3]),  # 6 4 | 7 3 | 10 | 2
        ("first_fit_decreasing", [2, 1, 1, 2, 0, 3]),  # 10 | 7 3 | 6 4 | 2
        ("best_fit_decreasing", [2, 1, 1, 2, 0, 3]),
        ("spfhp", [2, 1, 1, 2, 0, 3]),
    ],
)
def test_packs_by_hand(name: str, expected: list[int]) -> None:
    assert place(name, [6, 7, 3, 4, 10, 2], 10).tolist() == expected


def test_the_decreasing_packers_differ() -> None:
    # Of 14, 10, 8 and 2, the 8 goes to the 10; that leaves 6 and 2 tokens of room.
    assert place("first_fit_decreasing", [2, 8, 10, 14], 20).tolist() == [0, 1, 1, 0]
    assert place("best_fit_decreasing", [2, 8, 10, 14], 20).tolist() == [1, 1, 1, 0]
    # Of 7, 6 and 3, the 3 would just fill the first pack.
    assert place("best_fit_decreasing", [3, 6, 7], 10).tolist() == [0, 1, 0]
    assert place("spfhp", [3, 6, 7], 10).tolist() == [1, 1, 0]


@pytest.mark.usefixtures("without_shuffling")
def test_isf_by_hand() -> None:
    def packs(full_ratio: float, rounds: int) -> NDArray[np.int64]:
        lengths = np.array([5, 4, 8, 3, 2, 6], dtype=np.int32)
        return ISF(full_ratio, rounds).place(lengths, 8, seed=0, epoch=0)

    # 5 | 4 | 8 | 3 2 | 6: the 8 is full. Then 5 | 4 3 | 2 6, the last of which is full. Then 5 | 4 3.
    assert packs(full_ratio=1.0, rounds=3).tolist() == [2, 3, 0, 3, 1, 1]
    assert packs(full_ratio=1.0, rounds=1).tolist() == [0, 1, 2, 3, 3, 4]
    assert packs(full_ratio=0.7, rounds=2).tolist() == [2, 3, 0, 3, 4, 1]  # 8 and 6 count as full; then 5 | 4 3 | 2
    assert packs(full_ratio=0.01, rounds=9).tolist() == [0, 1, 2, 3, 3, 4]


def test_isf_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"full_ratio=1.5 must be above 0 and at most 1"):
        ISF(full_ratio=1.5)
    with pytest.raises(ConfigError, match="rounds=0 must be at least 1"):
        ISF(rounds=0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", BASELINES)
def test_every_sample_is_placed_within_bounds(name: str, seed: int, draw_lengths: Draw) -> None:
    lengths = draw_lengths(seed)
    before = lengths.copy()
    packs = place(name, lengths, seed=seed, epoch=1)
    assert packs.dtype == np.int64
    assert packs.shape == lengths.shape
    assert np.array_equal(lengths, before)
    assert set(packs.tolist()) == set(range(packs.max() + 1)), "packs are numbered without gaps"
    assert np.bincount(packs, weights=lengths).max() <= PACK_LEN
    assert np.array_equal(packs, place(name, before, seed=seed, epoch=1)), "equal inputs, equal packs"


@pytest.mark.parametrize("name", BASELINES)
def test_epochs_and_seeds_change_what_is_shuffled(name: str, draw_lengths: Draw) -> None:
    lengths = np.concatenate([draw_lengths(seed) for seed in range(3)])
    first = place(name, lengths)
    assert np.array_equal(first, place(name, lengths, epoch=1)) == (name not in SHUFFLED)
    assert np.array_equal(first, place(name, lengths, seed=1)) == (name not in (*SHUFFLED, "longalign_packing"))


@pytest.mark.parametrize("name", BASELINES)
def test_no_sample_and_one_sample(name: str) -> None:
    assert place(name, []).tolist() == []
    assert place(name, [PACK_LEN]).tolist() == [0]
    assert place(name, [1], 1).tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("name", "stream", "choose"),
    [
        ("first_fit_shuffle", "baseline", lambda rooms: rooms[0]),
        ("best_fit_shuffle", "baseline", min),
        ("first_fit_decreasing", None, lambda rooms: rooms[0]),
        ("best_fit_decreasing", None, min),
        ("spfhp", None, max),
    ],
)
def test_packers_equal_the_plain_loop(
    name: str, stream: str | None, choose: Callable[[list[int]], int], seed: int, draw_lengths: Draw
) -> None:
    lengths = draw_lengths(seed)
    if stream:
        order = hashed_order(len(lengths), seed=seed, epoch=2, stream=stream).tolist()
    else:
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs = place(name, lengths, seed=seed, epoch=2)
    assert packs[order].tolist() == slow_place(lengths[order].tolist(), PACK_LEN, choose)


@pytest.mark.parametrize("seed", range(20))
def test_longalign_leaves_a_token_free_where_samples_share_a_pack(seed: int, draw_lengths: Draw) -> None:
    lengths = draw_lengths(seed)
    packs = place("longalign_packing", lengths, seed=seed)
    tokens, samples = np.bincount(packs, weights=lengths), np.bincount(packs)
    assert np.all((tokens < PACK_LEN) | (samples == 1))


def test_better_packers_need_fewer_packs() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 1, 4096).astype(np.int32)
    num_packs = {name: int(place(name, lengths, 4096).max()) + 1 for name in BASELINES}
    least = -(-int(lengths.sum()) // 4096)
    assert num_packs["best_fit_decreasing"] <= least + 1
    assert num_packs["first_fit_shuffle"] < num_packs["isf"] < num_packs["random"] < num_packs["none"] == 20_000
    assert num_packs["isf"] < 1.08 * least

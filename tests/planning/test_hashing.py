import numpy as np

from hbp_tune.planning.plans.hashing import _splitmix64, hashed_order


def test_orders_are_permutations_and_depend_on_every_argument() -> None:
    base = {"seed": 1, "epoch": 0, "stream": "samples"}
    orders = [hashed_order(50, **(base | change)) for change in ({}, {"seed": 2}, {"epoch": 1}, {"stream": "steps"})]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert np.array_equal(hashed_order(50, **base), orders[0])


def test_orders_are_the_same_on_every_machine() -> None:
    assert hashed_order(10, seed=42, epoch=3, stream="samples").tolist() == [5, 1, 6, 0, 2, 4, 9, 8, 7, 3]


def test_any_seed_works() -> None:
    for seed in (0, -1, 2**62, 2**70):
        assert sorted(hashed_order(5, seed=seed, epoch=0, stream="x").tolist()) == [0, 1, 2, 3, 4]


def test_no_position_is_favoured() -> None:
    first = [int(hashed_order(10, seed=seed, epoch=0, stream="x")[0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260


def test_integers_mix_as_published() -> None:
    # First outputs of SplitMix64 for these seeds, as in the reference code and in Java's SplittableRandom.
    mixed = _splitmix64(np.array([0, 1234567], dtype=np.uint64))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_a_seed_never_takes_over_another_seeds_epochs() -> None:
    orders = {
        tuple(hashed_order(30, seed=seed, epoch=epoch, stream="samples").tolist()) for seed in range(8) for epoch in range(8)
    }
    assert len(orders) == 64


def test_orders_of_nothing_and_of_one() -> None:
    assert hashed_order(0, seed=0, epoch=0, stream="x").tolist() == []
    assert hashed_order(1, seed=0, epoch=0, stream="x").tolist() == [0]

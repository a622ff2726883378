import numpy as np

from hbp_tune.components.planning.hashing import hashed_order


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

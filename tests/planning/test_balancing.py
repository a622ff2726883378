import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.packing.balancing import attention_work, deal_micro_steps, spread_tail, work_by
from hbp_tune.planning.packing.first_fit import first_fit
from hbp_tune.planning.packing.lpt import lpt
from hbp_tune.planning.plans.packs import Packs
from tests.planning.helpers import array, chat_lengths, cost_doubling_at, packs_of, rows_of


def test_attention_work_does_not_overflow() -> None:
    assert attention_work(np.array([3, 131072, 2**20], dtype=np.int32)).tolist() == [9, 2**34, 2**40]


def test_work_by_hand() -> None:
    lengths, cost = array(3, 2**20), cost_doubling_at(10)
    assert work_by("attention", lengths, cost).tolist() == [9, 2**40]
    assert work_by("cost", lengths, cost).tolist() == [39, 2**40 + 10 * 2**20]
    assert work_by("tokens", lengths, cost).tolist() == [3, 2**20]
    assert work_by("tokens", lengths, cost).dtype == np.int64
    assert work_by(None, lengths, cost).tolist() == [9, 2**40]


def test_spread_tail_by_hand() -> None:
    lengths = array(4, 3, 2, 1, 8)
    packs = spread_tail(packs_of([0, 1, 2, 3], [4], [4]), lengths, num_replicas=2, pack_len=10)
    # 4 | 3; then 2 joins 3 (9 < 16), 1 joins 3 and 2 (13 < 16)
    assert rows_of(packs) == [[0], [1, 2, 3], [4], [4]]


def sorted_packs(lengths: NDArray[np.int32], pack_len: int) -> Packs:
    place = first_fit(lengths, pack_len)
    packs = Packs.from_places(np.arange(len(lengths), dtype=np.int32), place, int(place.max()) + 1)
    return packs.take(np.argsort(packs.sums(attention_work(lengths)), kind="stable"))


@pytest.mark.parametrize("seed", range(20))
def test_spread_tail_keeps_samples_capacity_and_a_multiple_of_the_replicas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pack_len, num_replicas = 100, int(rng.integers(1, 9))
    lengths = rng.integers(1, 101 if seed % 2 else 30, 300).astype(np.int32)
    packs = sorted_packs(lengths, pack_len)
    spread = spread_tail(packs, lengths, num_replicas=num_replicas, pack_len=pack_len)
    assert len(spread) == -(-len(packs) // num_replicas) * num_replicas
    assert sorted(spread.ids.tolist()) == list(range(300))
    assert (spread.sums(lengths.astype(np.int64)) <= pack_len).all()
    # What is not spread keeps its packs and their order.
    rest = iter(rows_of(packs))
    assert all(row in rest for row in rows_of(spread)[num_replicas:])


def idle(packs: Packs, lengths: NDArray[np.int32], num_replicas: int) -> float:
    """Sum the idle shares of attention work over the micro-steps."""
    work = packs.sums(attention_work(lengths)).reshape(-1, num_replicas)
    return float((1 - work.mean(axis=1) / work.max(axis=1)).sum())


def every_tail(packs: Packs, lengths: NDArray[np.int32], num_replicas: int, pack_len: int) -> list[Packs]:
    """Spread each tail that could be: one for each multiple of the replicas where it may start."""
    num_tail, spreads = len(packs) % num_replicas, []
    for first in range(0, len(packs), num_replicas):
        rows = rows_of(packs)
        tail = [rows.pop(first) for _ in range(num_tail)]
        ids = sorted((i for row in tail for i in row), key=lambda i: -lengths[i])
        place = np.empty(len(ids), dtype=np.int64)
        if lpt(lengths[ids].astype(np.int64), 0, num_replicas, pack_len, place):
            dealt = tail + [[]] * (num_replicas - num_tail)
        else:
            dealt = [[i for i, pack in zip(ids, place, strict=True) if pack == replica] for replica in range(num_replicas)]
        spreads.append(packs_of(*dealt, *rows))
    return spreads


def test_the_tail_is_the_best_or_nearly() -> None:
    worse = []
    for seed in range(20):
        lengths, num_replicas = chat_lengths(300, 8192, seed), 3 + seed % 6
        packs = sorted_packs(lengths, 8192)
        if len(packs) % num_replicas:
            got = idle(spread_tail(packs, lengths, num_replicas=num_replicas, pack_len=8192), lengths, num_replicas)
            worse.append(got - min(idle(each, lengths, num_replicas) for each in every_tail(packs, lengths, num_replicas, 8192)))
    # How LPT will divide a tail is estimated, so the second best may be taken.
    assert len(worse) > 12
    assert np.count_nonzero(np.array(worse) < 1e-9) > 0.8 * len(worse)
    assert max(worse) < 0.15


@pytest.mark.parametrize(("slices", "accumulation"), [(1, 4), (3, 4), (8, 4), (10, 4), (7, 1), (100, 3), (6, 4)])
def test_steps_are_whole_and_hold_light_and_heavy_micro_steps(slices: int, accumulation: int) -> None:
    step = deal_micro_steps(slices, accumulation)
    sizes = np.bincount(step)
    assert sizes.max() - sizes.min() <= 1
    assert len(sizes) == max(1, int(slices / accumulation + 0.5))
    assert len(step) == slices
    if len(sizes) > 1 and sizes.min() > 1:
        halves = [np.flatnonzero(step == s) for s in range(len(sizes))]
        assert all(members.min() < slices / 2 <= members.max() for members in halves)


def test_samples_that_do_not_fit_when_dealt_stay_in_their_packs() -> None:
    # Dealt, each of eight packs would take a 3 and a 2, and the ninth 2 would find only room of 1.
    packs, lengths = [], []
    for parts in ([3, 3], [2, 2, 2], [2, 2, 2], [2, 2, 2], [3, 3], [3, 3], [3, 3]):
        packs.append(list(range(len(lengths), len(lengths) + len(parts))))
        lengths += parts
    spread = spread_tail(packs_of(*packs), array(*lengths), num_replicas=8, pack_len=6)
    assert rows_of(spread) == [*packs, []]


def test_packs_that_divide_stay_as_they_are() -> None:
    packs = packs_of([0], [1], [2], [3])
    assert spread_tail(packs, array(6, 6, 1, 1), num_replicas=2, pack_len=6) is packs
    assert spread_tail(packs, array(6, 6, 1, 1), num_replicas=1, pack_len=6) is packs


def test_a_pack_may_be_dealt_full() -> None:
    # The last 2 finds 4 of 5 tokens in the pack with the least work, and makes the next one exactly full.
    spread = spread_tail(packs_of([0, 1], [2, 3], [4, 5]), array(3, 2, 3, 2, 3, 2), num_replicas=4, pack_len=5)
    assert rows_of(spread) == [[0, 5], [2], [4], [1, 3]]


def test_the_tail_that_divides_best_is_dealt_again() -> None:
    lengths = array(1, 1, 2, 2, 6, 6, 6, 6)
    small_first = spread_tail(packs_of([0, 1, 2, 3], [4], [5], [6], [7]), lengths, num_replicas=4, pack_len=6)
    assert [sorted(row) for row in rows_of(small_first)] == [[2], [3], [0], [1], [4], [5], [6], [7]]
    # One sample of 3 cannot be divided, and is unlike the 6es: so the pack of small samples at the end is dealt.
    lengths = array(3, 3, 3, 3, 3, 2, 2, 2, 2)
    small_last = spread_tail(packs_of([0], [1], [2], [3], [5, 6, 7, 8]), lengths, num_replicas=4, pack_len=8)
    assert rows_of(small_last) == [[5], [6], [7], [8], [0], [1], [2], [3]]


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_about_as_large_as_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices, accumulation = int(rng.integers(1, 500)), int(rng.integers(1, 40))
    step = deal_micro_steps(slices, accumulation)
    num_steps = int(step.max()) + 1
    # Of all numbers of whole steps, none comes closer; few micro-steps make one step.
    assert abs(slices / accumulation - num_steps) <= 0.5 or (num_steps == 1 and slices < accumulation)

import numpy as np
import pytest

from hbp_tune.components.planning.balancing import attention_work, deal_micro_steps, sort_by_attention, spread_tail


def test_attention_work_does_not_overflow() -> None:
    assert attention_work(np.array([3, 131072, 2**20], dtype=np.int32)).tolist() == [9, 2**34, 2**40]


def test_packs_sort_by_work_and_ties_keep_their_order() -> None:
    lengths = np.array([4, 3, 3, 5, 1], dtype=np.int32)
    packs = [np.array([3]), np.array([1, 2]), np.array([0, 4]), np.array([0])]  # 25, 18, 17, 16
    assert [pack.tolist() for pack in sort_by_attention(packs, lengths)] == [[0], [0, 4], [1, 2], [3]]
    equal = [np.array([1]), np.array([2])]
    assert [pack.tolist() for pack in sort_by_attention(equal, lengths)] == [[1], [2]]


def test_spread_tail_by_hand() -> None:
    lengths = np.array([4, 3, 2, 1, 8], dtype=np.int32)
    packs = spread_tail([np.array([0, 1, 2, 3]), np.array([4]), np.array([4])], lengths, num_replicas=2, pack_len=10)
    # 4 | 3; then 2 joins 3 (9 < 16), 1 joins 3 and 2 (13 < 16)
    assert [pack.tolist() for pack in packs] == [[0], [1, 2, 3], [4], [4]]


@pytest.mark.parametrize("seed", range(20))
def test_spread_tail_keeps_samples_capacity_and_a_multiple_of_the_replicas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pack_len, num_replicas = 100, int(rng.integers(1, 9))
    lengths = rng.integers(1, 101 if seed % 2 else 30, 300).astype(np.int32)
    packs, ids = [], list(range(300))
    while ids:
        pack = [ids.pop()]
        while ids and lengths[pack].sum() + lengths[ids[-1]] <= pack_len:
            pack.append(ids.pop())
        packs.append(np.array(pack))
    spread = spread_tail(packs, lengths, num_replicas=num_replicas, pack_len=pack_len)
    assert len(spread) % num_replicas == 0
    assert sorted(int(i) for pack in spread for i in pack) == list(range(300))
    assert all(lengths[pack].sum() <= pack_len for pack in spread)


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
        packs.append(np.arange(len(lengths), len(lengths) + len(parts)))
        lengths += parts
    spread = spread_tail(packs, np.array(lengths, dtype=np.int32), num_replicas=8, pack_len=6)
    assert [pack.tolist() for pack in spread] == [*(pack.tolist() for pack in packs), []]


def test_packs_that_divide_stay_as_they_are() -> None:
    lengths = np.array([6, 6, 1, 1], dtype=np.int32)
    packs = [np.array([i]) for i in range(4)]
    assert spread_tail(packs, lengths, num_replicas=2, pack_len=6) is packs
    assert spread_tail(packs, lengths, num_replicas=1, pack_len=6) is packs


def test_a_pack_may_be_dealt_full() -> None:
    # The last 2 finds 4 of 5 tokens in the pack with the least work, and makes the next one exactly full.
    lengths = np.array([3, 2, 3, 2, 3, 2], dtype=np.int32)
    packs = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    spread = spread_tail(packs, lengths, num_replicas=4, pack_len=5)
    assert [pack.tolist() for pack in spread] == [[0, 5], [2], [4], [1, 3]]


def test_only_the_first_packs_are_dealt_again() -> None:
    lengths = np.array([1, 1, 2, 2, 6, 6, 6, 6], dtype=np.int32)
    packs = [np.array([0, 1, 2, 3]), *(np.array([i]) for i in range(4, 8))]
    spread = spread_tail(packs, lengths, num_replicas=4, pack_len=6)
    assert [sorted(pack.tolist()) for pack in spread] == [[2], [3], [0], [1], [4], [5], [6], [7]]


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_about_as_large_as_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices, accumulation = int(rng.integers(1, 500)), int(rng.integers(1, 40))
    step = deal_micro_steps(slices, accumulation)
    num_steps = int(step.max()) + 1
    # Of all numbers of whole steps, none comes closer; few micro-steps make one step.
    assert abs(slices / accumulation - num_steps) <= 0.5 or (num_steps == 1 and slices < accumulation)

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.groups import group_of_lengths
from hbp_tune.planning.packing.leveling import (
    cost_limit,
    fill_level,
    group_by_cost,
    level_heavy,
    level_windows,
    longest_within,
)
from hbp_tune.planning.plans.packs import Packs
from hbp_tune.planning.plans.records import PackingGroup
from tests.planning.helpers import array, chat_lengths, cost_doubling_at, packs_of, rows_of

Lengths = NDArray[np.int32]
ANY_COST = (cost_doubling_at(1), cost_doubling_at(40), CostModel())


def ids_of(lengths: Lengths) -> Lengths:
    return np.arange(len(lengths), dtype=np.int32)


def idle(packs: Packs, lengths: Lengths, cost: CostModel, num_replicas: int) -> NDArray[np.float64]:
    """Idle share of modelled cost of each micro-step."""
    load = packs.sums(cost.sample_cost(lengths)).reshape(-1, num_replicas)
    return 1 - load.mean(axis=1) / load.max(axis=1)


# Which samples cost too much for a group


@pytest.mark.parametrize("double_len", [1, 5, 100])
def test_longest_within_equals_counting(double_len: int) -> None:
    costs = [length * (length + double_len) for length in range(60)]
    for budget in range(2000):
        assert longest_within(budget, double_len) == max(length for length in range(60) if costs[length] <= budget)


@pytest.mark.parametrize("double_len", [1, 41_516, 2**20])
def test_longest_within_is_exact_where_floats_are_not(double_len: int) -> None:
    for length in (2**20, 2**26 + 1, 2**30 - 1):
        budget = length * (length + double_len)
        assert [longest_within(budget + more, double_len) for more in (-1, 0, 1)] == [length - 1, length, length]


def test_cost_limit_by_hand() -> None:
    cost = cost_doubling_at(10)
    # A mean token of ten 2s costs 12: a sample may cost 0.96 * 20 * 12 = 230, so 10 * 20 but not 11 * 21.
    assert cost_limit(np.full(10, 2, dtype=np.int32), 20, cost, 8) == 10
    # With a 20, which costs 600, a mean token costs 21 and a sample may cost 403: 15 * 25. Without it: as above.
    assert cost_limit(array(*[2] * 10, 20), 20, cost, 8) == 10
    assert cost_limit(array(*[2] * 10, 20), 20, cost, 1) == 20, "a single replica keeps nobody waiting"
    assert cost_limit(array(), 20, cost, 8) == 20


def test_no_limit_suits_samples_of_one_length_as_long_as_the_pack() -> None:
    assert cost_limit(np.full(50, 100, dtype=np.int32), 100, cost_doubling_at(10), 4) < 100


@pytest.mark.parametrize("seed", range(20))
def test_cost_limit_is_the_longest_that_a_mean_pack_covers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pack_len, cost = int(rng.integers(10, 200)), ANY_COST[seed % 3]
    lengths = np.clip(rng.lognormal(2, 1.2, rng.integers(1, 200)), 1, pack_len).astype(np.int32)
    limit = cost_limit(lengths, pack_len, cost, 4)

    def is_covered(longest: int) -> bool:
        own = lengths[lengths <= longest]
        mean_cost = int(cost.sample_cost(own).sum()) / int(own.sum())
        return longest * (longest + cost.double_len) <= int(0.96 * pack_len * mean_cost)

    covered = [longest for longest in range(int(lengths.min()), pack_len + 1) if is_covered(longest)]
    assert limit == covered[-1] if covered else limit < lengths.min()


def two_lengths(short: int, longer: int) -> tuple[PackingGroup, ...]:
    return PackingGroup(name="short", pack_len=short), PackingGroup(name="long", pack_len=longer, cp_degree=2)


def test_a_costly_sample_moves_to_the_next_group() -> None:
    groups, cost = two_lengths(20, 64), cost_doubling_at(10)
    lengths = array(*[2] * 300, 20, 10, 21, 64)
    # 20 of 630 tokens may move; 10 is the limit, see above.
    assert group_by_cost(lengths, groups, cost, 8).tolist() == [0] * 300 + [1, 0, 1, 1]
    assert group_by_cost(lengths, groups[:1], cost, 8).tolist() == [0] * 302 + [1, 1], "nowhere to move to"
    # 60 of 670 tokens are too many: they stay together.
    many = array(*[2] * 300, 20, 20, 20, 10, 21, 64)
    assert group_by_cost(many, groups, cost, 8).tolist() == [0] * 304 + [1, 1]
    # A single replica keeps nobody waiting.
    assert group_by_cost(lengths, groups, cost, 1).tolist() == [0] * 302 + [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_their_samples_and_few_move(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, lengths = ANY_COST[seed % 3], np.clip(rng.lognormal(3, 1.2, 2000), 1, 1000).astype(np.int32)
    groups = [PackingGroup(name=str(n), pack_len=int(n)) for n in (100, 200 + 2 * rng.integers(0, 100), 1000)]
    by_cost, by_length = group_by_cost(lengths, groups, cost, 8), group_of_lengths(lengths, groups)
    assert (by_cost >= by_length).all()
    assert by_cost.max() < 3
    for index in range(2):
        own = lengths[by_length == index]
        assert lengths[(by_length == index) & (by_cost > index)].sum() <= 0.05 * own.sum() + 1
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(by_cost[order]) >= 0).all(), "a longer sample is never in a shorter group"


# Random windows


def level(
    lengths: Lengths, cost: CostModel, pack_len: int, num_replicas: int, accumulation: int, heavy_slices: int = 0
) -> tuple[Packs, NDArray[np.int64]]:
    return level_windows(
        ids_of(lengths),
        lengths,
        cost,
        pack_len=pack_len,
        num_replicas=num_replicas,
        accumulation=accumulation,
        heavy_slices=heavy_slices,
    )


@pytest.mark.parametrize("seed", range(20))
def test_windows_keep_samples_capacity_and_whole_micro_steps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_replicas, accumulation, heavy_slices = (int(n) for n in rng.integers((1, 1, 0), (9, 5, 4)))
    lengths = rng.integers(1, [8, 40, 65][seed % 3], rng.integers(1, 2000)).astype(np.int32)
    packs, steps = level(lengths, ANY_COST[seed % 2], 64, num_replicas, accumulation, heavy_slices)
    assert sorted(packs.ids.tolist()) == list(range(len(lengths)))
    assert (packs.sums(lengths.astype(np.int64)) <= 64).all()
    assert len(packs) == num_replicas * (len(steps) - heavy_slices)
    assert packs.sums(lengths.astype(np.int64)).reshape(-1, num_replicas).any(axis=1).all(), "no micro-step without a sample"
    counts = np.bincount(steps)
    assert steps.min() == 0
    assert counts.all(), "no step without a micro-step"
    assert abs(len(steps) / accumulation - len(counts)) <= 0.5 or len(counts) == 1
    if seed % 3 < 2:  # samples of more than half a pack may leave micro-steps empty, which are left out
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_replicas", [1, 8, 32, 200])
def test_packs_of_a_window_cost_the_same(num_replicas: int) -> None:
    lengths, cost = chat_lengths(60_000, 12_000), CostModel()
    packs, steps = level(lengths, cost, 16_384, num_replicas, 1)
    loads = packs.sums(cost.sample_cost(lengths))
    assert loads.max() / loads.min() < 1.1
    assert idle(packs, lengths, cost, num_replicas).max() < 0.02
    assert idle(packs, lengths, cost, num_replicas).mean() < 0.002
    assert len(packs) < 1.05 * lengths.sum() / 16_384 + num_replicas, "few token slots stay free"
    assert np.array_equal(np.sort(steps), np.arange(len(steps)))


def test_heavy_micro_steps_are_shared_out_over_the_steps() -> None:
    lengths = chat_lengths(20_000, 8192)
    packs, steps = level(lengths, CostModel(), 16_384, 8, 4, heavy_slices=10)
    assert len(steps) == 10 + len(packs) // 8
    assert np.unique(steps[:10]).size == 10, "no step has two of them"
    counts = np.bincount(steps)
    assert counts.max() - counts.min() <= 1


def test_windows_take_neighbours_in_the_given_order() -> None:
    # 128 packs of 64 hold 16 windows' worth of samples: a window's ids lie close together.
    lengths = np.random.default_rng(0).integers(1, 20, 16 * 128 * 6).astype(np.int32)
    packs, steps = level(lengths, cost_doubling_at(40), 64, 8, 1)
    ends = packs.offsets[::8]
    spans = [np.ptp(packs.ids[start:end]) for start, end in itertools.pairwise(ends)]
    assert len(spans) == len(steps)
    assert max(spans) < 1.5 * len(lengths) / 16


def test_a_step_has_light_and_heavy_micro_steps_of_its_window() -> None:
    lengths, cost = chat_lengths(20_000, 12_000), CostModel()
    packs, steps = level(lengths, cost, 16_384, 4, 8)
    loads = packs.sums(cost.sample_cost(lengths)).reshape(-1, 4).sum(axis=1)
    per_step = np.bincount(steps, weights=loads) / np.bincount(steps)
    assert per_step.max() / per_step.min() < 1.02


@pytest.mark.parametrize("accumulation", [1, 4])
def test_samples_for_less_than_a_window_fill_their_packs(accumulation: int) -> None:
    # 300K tokens for four replicas of 16K: five micro-steps are enough.
    lengths = chat_lengths(500, 8192)
    packs, _ = level(lengths, CostModel(), 16_384, 4, accumulation)
    assert len(packs) // 4 <= math.ceil(lengths.sum() / (4 * 16_384)) + 1


def test_costs_of_very_many_tokens_do_not_overflow() -> None:
    # Ten billion tokens: their cost, times the number of micro-steps, is more than 64 bits hold.
    lengths = np.full(100_000, 100_000, dtype=np.int32)
    packs, steps = level(lengths, CostModel(), 2**20, 1, 1)
    assert np.array_equal(np.sort(packs.ids), ids_of(lengths))
    assert np.diff(packs.offsets).max() <= 10
    assert len(packs) == len(steps) < 10_500


# Long samples


def test_a_costly_sample_heads_a_micro_step_by_hand() -> None:
    cost, shape = cost_doubling_at(1), {"pack_len": 10, "num_replicas": 2}
    # 9 costs 90, more than half of 90 + 3 * 6: the others fill the second pack up to that.
    assert rows_of(level_heavy(ids_of(array(9, 2, 2, 2)), array(9, 2, 2, 2), cost, **shape)) == [[0], [1, 2, 3]]
    # 8 is its nearest neighbour: 72 of 90, and room for two 1s.
    assert rows_of(level_heavy(ids_of(array(1, 8, 9, 1)), array(1, 8, 9, 1), cost, **shape)) == [[2], [1, 0, 3]]
    # 8 and 7 cost 128, no more than 3 and 2 with them in two packs: all are dealt, and just fit.
    assert rows_of(level_heavy(ids_of(array(3, 7, 8, 2)), array(3, 7, 8, 2), cost, **shape)) == [[2, 3], [1, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_long_samples_keep_capacity_and_come_from_heavy_to_light(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost, num_replicas = ANY_COST[seed % 3], int(rng.integers(1, 9))
    lengths = rng.integers(*[(1, 101), (51, 101), (100, 101), (1, 10)][seed % 4], rng.integers(1, 300)).astype(np.int32)
    packs = level_heavy(ids_of(lengths), lengths, cost, pack_len=100, num_replicas=num_replicas)
    assert sorted(packs.ids.tolist()) == list(range(len(lengths)))
    assert (packs.sums(lengths.astype(np.int64)) <= 100).all()
    assert len(packs) % num_replicas == 0
    levels = packs.sums(cost.sample_cost(lengths)).reshape(-1, num_replicas).max(axis=1)
    assert levels.all(), "no micro-step without a sample"
    if num_replicas > 1:
        assert (np.diff(levels) <= 0.02 * levels[:-1]).all()


@pytest.mark.parametrize("num_replicas", [2, 4, 8])
def test_long_samples_are_levelled(num_replicas: int) -> None:
    lengths, cost = np.random.default_rng(0).integers(4096, 131_073, 600).astype(np.int32), CostModel()
    packs = level_heavy(ids_of(lengths), lengths, cost, pack_len=131_072, num_replicas=num_replicas)
    short = chat_lengths(60_000, 12_000)
    every = np.concatenate((lengths, short))
    filled, _ = fill_level(packs, ids_of(every)[600:], every, cost, pack_len=131_072, num_replicas=num_replicas)
    assert idle(packs, lengths, cost, num_replicas).mean() < 0.01
    assert idle(filled, every, cost, num_replicas).max() < 0.01
    assert idle(filled, every, cost, num_replicas).mean() <= idle(packs, lengths, cost, num_replicas).mean()


def test_samples_over_half_a_pack_are_alone_beside_their_like() -> None:
    lengths = np.random.default_rng(0).integers(16_385, 32_769, 10_000).astype(np.int32)
    packs = level_heavy(ids_of(lengths), lengths, CostModel(), pack_len=32_768, num_replicas=4)
    assert np.diff(packs.offsets).tolist() == [1] * 10_000
    assert np.ptp(lengths[packs.ids].reshape(-1, 4), axis=1).max() < 50


# Idle time that shorter samples fill


def test_fill_level_by_hand() -> None:
    cost, lengths = cost_doubling_at(1), array(9, 5, 6, 5, 1, 1, 2, 1)
    # 9 costs 90 and 5 costs 30: a gap of 60, but room for 5 only. The 6 is too long, the 5 fits; the 1s fit nowhere any more:
    # the first pack has room but sets the level.
    filled, left = fill_level(packs_of([0], [1]), array(2, 3, 4, 5), lengths, cost, pack_len=10, num_replicas=2)
    assert rows_of(filled) == [[0], [1, 3]]
    assert left.tolist() == [2, 4, 5]
    # Two micro-steps: the walk goes on where it stood. 9 | 5 takes 2 1 1; 5 | 5 and the first pack are level.
    filled, left = fill_level(packs_of([0], [1], [3], [3]), array(6, 4, 5, 2), lengths, cost, pack_len=9, num_replicas=2)
    assert rows_of(filled) == [[0], [1, 6, 4, 5], [3], [3]]
    assert left.tolist() == [2]


def test_an_empty_pack_is_filled_up_to_the_level() -> None:
    filled, left = fill_level(packs_of([0], []), array(1, 2), array(4, 4, 4), cost_doubling_at(1), pack_len=9, num_replicas=2)
    assert rows_of(filled) == [[0], [1]]
    assert left.tolist() == [2]


@pytest.mark.parametrize("seed", range(20))
def test_filling_never_raises_a_level(seed: int, draw_lengths: Callable[[int], Lengths]) -> None:
    rng = np.random.default_rng(seed)
    cost, num_replicas, lengths = ANY_COST[seed % 3], int(rng.integers(1, 9)), np.append(draw_lengths(seed), np.int32(256))
    is_long = lengths > 40
    packs = level_heavy(ids_of(lengths)[is_long], lengths, cost, pack_len=256, num_replicas=num_replicas)
    candidates = rng.permutation(ids_of(lengths)[~is_long])[: [30, 400][seed % 2]]
    filled, left = fill_level(packs, candidates, lengths, cost, pack_len=256, num_replicas=num_replicas)
    before, after = (each.sums(cost.sample_cost(lengths)).reshape(-1, num_replicas) for each in (packs, filled))
    assert np.array_equal(before.max(axis=1), after.max(axis=1))
    assert (filled.sums(lengths.astype(np.int64)) <= 256).all()
    assert sorted([*filled.ids.tolist(), *left.tolist()]) == sorted([*packs.ids.tolist(), *candidates.tolist()])
    assert left.tolist() == [i for i in candidates.tolist() if i in set(left.tolist())], "in their order"
    assert all(new[: len(old)] == old for old, new in zip(rows_of(packs), rows_of(filled), strict=True))
    if len(candidates) <= 32:  # so few are all tried on each pack
        gap = (after.max(axis=1, keepdims=True) - after).ravel()
        room = 256 - filled.sums(lengths.astype(np.int64))
        costs = cost.sample_cost(lengths)
        assert not any(((lengths[i] <= room) & (costs[i] <= gap)).any() for i in left)


def test_nothing_to_fill_with() -> None:
    filled, left = fill_level(packs_of([0], []), array(), array(4), cost_doubling_at(1), pack_len=9, num_replicas=2)
    assert rows_of(filled) == [[0], []]
    assert left.tolist() == []

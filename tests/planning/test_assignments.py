import itertools
from dataclasses import replace

import numpy as np
import pytest

from hbp_tune.errors import PackingError
from hbp_tune.planning.comparison.assignments import MixedDegrees, assign_epoch, dynamic_cp, flexsp, least_mixed_s
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.costs.hardware import H100
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from tests.planning.helpers import chat_lengths

COST = CostModel()
WORLD_SIZE, LOCAL_LEN = 8, 2048
# 2,048 tokens a rank.
GROUP = PackingGroup(name="long", pack_len=16_384, cp_degree=8, ac_layers=4)


@pytest.mark.parametrize("make", [flexsp, dynamic_cp])
@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_once_in_a_pack_that_holds_it(make: object, seed: int) -> None:
    lengths = np.concatenate((chat_lengths(400, 2048, seed), [3000, 9000, 16_000])).astype(np.int32)
    how: MixedDegrees = make(GROUP)  # type: ignore[operator]
    work = assign_epoch(lengths, how, tokens_per_step=32_768, world_size=WORLD_SIZE, cost=COST, seed=seed)
    assert work.tokens.sum() == lengths.sum()
    assert work.squares.sum() == (lengths.astype(np.int64) ** 2).sum()
    assert (work.tokens <= work.cp_degree * LOCAL_LEN).all()
    assert (np.add.reduceat(work.cp_degree, work.micro_step_starts) == WORLD_SIZE).all(), "every rank has a pack"
    assert set(work.ac_layers.tolist()) == {4}
    assert (work.cp_degree[np.argmax(work.squares)]) == 8, "16,000 tokens need all ranks"


def test_degrees_by_hand() -> None:
    # 4,096 tokens need two ranks, 4,097 four; short ones fill what is left.
    lengths = np.array([4096, 4097, 100, 100], dtype=np.int32)
    work = assign_epoch(lengths, dynamic_cp(GROUP), tokens_per_step=100_000, world_size=8, cost=COST)
    assert sorted(work.cp_degree.tolist()) == [1, 1, 2, 4]
    assert sorted(work.tokens.tolist()) == [100, 100, 4096, 4097]


def test_wider_degrees_are_taken_where_they_are_faster() -> None:
    # One long sample and nothing else to do for the other ranks.
    lengths = np.array([4096], dtype=np.int32)
    narrow = assign_epoch(lengths, dynamic_cp(GROUP), tokens_per_step=8192, world_size=8, cost=COST)
    wide = assign_epoch(lengths, flexsp(GROUP), tokens_per_step=8192, world_size=8, cost=COST)
    assert narrow.cp_degree.max() == 2
    assert wide.cp_degree.max() == 8
    assert simulate(wide, COST).busy_s.max() < simulate(narrow, COST).busy_s.max()


@pytest.mark.parametrize("seed", range(10))
def test_short_samples_are_within_the_bound_of_lpt(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(100, 2000, 7).astype(np.int32)
    group = PackingGroup(name="g", pack_len=16_384)
    work = assign_epoch(lengths, dynamic_cp(group), tokens_per_step=10**6, world_size=2, cost=COST)
    squares = lengths.astype(np.int64) ** 2
    best = min(
        max(squares[list(chosen)].sum(), squares.sum() - squares[list(chosen)].sum())
        for size in range(8)
        for chosen in itertools.combinations(range(7), size)
    )
    assert work.squares.max() <= (4 / 3 - 1 / 6) * best, "Graham 1969: 4/3 - 1/(3 * 2)"


def test_a_sample_that_all_ranks_cannot_hold() -> None:
    with pytest.raises(PackingError, match=r"a sample has 20000 tokens, 8 ranks hold 16384; give longer packs or more ranks"):
        assign_epoch(np.array([20_000], dtype=np.int32), flexsp(GROUP), tokens_per_step=1, world_size=8, cost=COST)


def test_the_bound_of_mixed_steps_by_hand() -> None:
    # 2,000 tokens stay on a rank; 9,000 need at least eight of these, where the short group has no room for them.
    lengths, cost = np.array([2000, 9000], dtype=np.int32), CostModel(rates=replace(H100, micro_step_tokens=0.0))
    short = PackingGroup(name="short", pack_len=2048)
    bound = least_mixed_s(lengths, [short, GROUP], world_size=8, cost=cost)
    ones = np.ones(1, dtype=np.int64)
    alone = cost.pack_seconds(2000 * ones, 2000**2 * ones, ones, 0 * ones).total[0]
    # Packs of 2,048 tokens a rank may do without recomputation, as the short group does.
    shared = cost.pack_seconds(9000 * ones, 9000**2 * ones, 8 * ones, 0 * ones).total[0]
    assert bound == pytest.approx((alone + 8 * shared) / 8)


@pytest.mark.parametrize("make", [flexsp, dynamic_cp])
def test_no_mixed_steps_and_no_plan_are_below_the_bound(make: object) -> None:
    lengths = np.concatenate((chat_lengths(400, 2048, 0), [3000, 9000, 16_000])).astype(np.int32)
    bound = least_mixed_s(lengths, [GROUP], world_size=WORLD_SIZE, cost=COST)
    how: MixedDegrees = make(GROUP)  # type: ignore[operator]
    work = assign_epoch(lengths, how, tokens_per_step=32_768, world_size=WORLD_SIZE, cost=COST)
    assert bound <= simulate(work, COST).epoch_s
    plan = BalancePlanner().plan(lengths, np.ones_like(lengths), [GROUP], world_size=WORLD_SIZE, seed=0, cost=COST)
    assert bound <= simulate(PackWork.of_plan(plan), COST).epoch_s

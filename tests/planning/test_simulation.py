from dataclasses import replace

import numpy as np
import pytest

from hbp_tune.planning.comparison.methods import BASELINE_NAMES, plan_baseline
from hbp_tune.planning.comparison.simulation import SHARES, PackWork, ideal_s, simulate
from hbp_tune.planning.costs.cost import CostModel, ModelShape
from hbp_tune.planning.costs.hardware import H100, Rates
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from tests.planning.helpers import chat_lengths

GROUPS = (PackingGroup(name="short", pack_len=4096, ac_layers=3), PackingGroup(name="long", pack_len=16_384, cp_degree=4))
COST = CostModel()


def plan_of(seed: int = 0, mode: str = "cost") -> EpochPlan:
    lengths = np.concatenate((chat_lengths(600, 4096, seed), chat_lengths(30, 16_384, seed, sigma=2.0) * 3)).astype(np.int32)
    return BalancePlanner(32_768, "truncate", mode=mode).plan(lengths, lengths, GROUPS, world_size=8, seed=seed, cost=COST)


@pytest.mark.parametrize("mode", ["cost", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_shares_are_of_all_time(mode: str, seed: int) -> None:
    plan = plan_of(seed, mode)
    result = simulate(PackWork.of_plan(plan), COST)
    assert result.epoch_s == result.micro_step_s.sum()
    assert result.gpu_days == pytest.approx(result.epoch_s * 8 / 86_400)
    assert tuple(result.shares) == SHARES
    assert sum(result.shares.values()) == pytest.approx(1)
    assert min(result.shares.values()) >= 0


def test_two_packs_by_hand() -> None:
    rates = Rates(
        machine="made up",
        token_flops_per_s=600,
        square_flops_per_s=6,
        exchange_bytes_per_s=1,
        network_bytes_per_s=1,
        gather_bytes_per_s=2.0,
        gather_network_bytes_per_s=1,
        micro_step_tokens=1.0,
    )
    cost = CostModel(ModelShape(num_layers=1, linear_params=100, attention_dim=1, gathered_params=4), rates)
    # Two ranks, a second for every token, one for every square, one for every micro-step; gathering takes 6 * 4 / 2 / 2 = 6.
    work = PackWork(
        tokens=np.array([3, 1, 1, 1]),
        squares=np.array([9, 1, 1, 1]),
        cp_degree=np.ones(4, dtype=np.int64),
        ac_layers=np.zeros(4, dtype=np.int64),
        keeps_attention=np.zeros(4, dtype=np.bool_),
        micro_step_starts=np.array([0, 2]),
        world_size=2,
    )
    result = simulate(work, cost)
    assert result.busy_s.tolist() == [13, 3, 3, 3]
    assert result.micro_step_s.tolist() == [13, 6]
    seconds = {name: share * 2 * 19 for name, share in result.shares.items()}
    by_hand = {"linear": 6, "attention": 12, "recompute": 0, "exchange": 0, "fixed": 4, "gather": 6, "idle": 10}
    assert seconds == pytest.approx(by_hand)


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_nothing_beats_the_ideal(name: str) -> None:
    lengths = chat_lengths(800, 16_384)
    bound = ideal_s(lengths, COST, GROUPS[1], 8)
    naive = plan_baseline(name, lengths, GROUPS[1], world_size=8, seed=0, tokens_per_step=32_768)
    assert simulate(PackWork.of_plan(naive), COST).epoch_s > bound
    planned = BalancePlanner(32_768).plan(lengths, lengths, GROUPS, world_size=8, seed=0, cost=COST)
    assert simulate(PackWork.of_plan(planned), COST).epoch_s > bound


def test_a_faster_network_hides_all_gathering() -> None:
    work = PackWork.of_plan(plan_of())
    slow = simulate(work, CostModel(rates=replace(H100, gather_bytes_per_s=1e9)))
    fast = simulate(work, CostModel(rates=replace(H100, gather_bytes_per_s=1e15)))
    assert slow.shares["gather"] > 0.5
    assert fast.shares["gather"] == 0
    assert fast.epoch_s < slow.epoch_s

import numpy as np
import pytest

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.comparison.assignments import least_mixed_s
from hbp_tune.planning.comparison.mixing import assign_mixed
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from tests.planning.helpers import chat_lengths

COST = CostModel()
GROUPS = tuple(PackingGroup(name=f"cp{degree}", pack_len=8192 * degree, cp_degree=degree, ac_layers=4) for degree in (1, 2, 4, 8))


def draw(seed: int, num_short: int = 3000, num_long: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    long = np.exp(rng.uniform(np.log(8192), np.log(65_536), num_long)).astype(np.int32)
    return np.concatenate((chat_lengths(num_short, 8192, seed), long)).astype(np.int32)


@pytest.mark.parametrize("seed", range(8))
def test_what_holds_for_every_assignment(seed: int) -> None:
    lengths = draw(seed)
    work = assign_mixed(lengths, GROUPS, world_size=16, cost=COST, seed=seed)
    assert work.tokens.sum() == lengths.sum()
    assert work.squares.sum() == (lengths.astype(np.int64) ** 2).sum(), "no sample is cut, none twice"
    assert (work.tokens <= 8192 * work.cp_degree).all()
    ranks = np.add.reduceat(work.cp_degree, work.micro_step_starts)
    assert (ranks == 16).all(), "every rank has a pack in every micro-step"
    seconds = simulate(work, COST).epoch_s
    assert seconds > least_mixed_s(lengths, GROUPS, world_size=16, cost=COST)
    # Not worse than steps of one group by more than balancing by one pass costs.
    planned = BalancePlanner().plan(lengths, lengths, [GROUPS[0], GROUPS[-1]], world_size=16, seed=seed, cost=COST)
    assert seconds < 1.02 * simulate(PackWork.of_plan(planned), COST).epoch_s


def test_long_samples_have_degrees_of_their_own() -> None:
    lengths = np.concatenate((np.full(4000, 700), [60_000, 30_000, 15_000])).astype(np.int32)
    work = assign_mixed(lengths, GROUPS, world_size=16, cost=COST)
    first = slice(0, int(work.micro_step_starts[1]))
    assert work.cp_degree[first].max() == 8
    assert len(set(work.cp_degree[first].tolist())) > 1, "the rest of the ranks do not share packs of eight"


@pytest.mark.parametrize("lengths", [[5], [8192] * 40, [60_000] * 9])
def test_data_of_one_kind(lengths: list[int]) -> None:
    work = assign_mixed(np.array(lengths, dtype=np.int32), GROUPS, world_size=8, cost=COST)
    assert work.tokens.sum() == sum(lengths)


def test_what_cannot_be_shared_out() -> None:
    with pytest.raises(PackingError, match=r"sample 1 has 65537 tokens, group 'cp8' holds 65536"):
        assign_mixed(np.array([5, 65_537], dtype=np.int32), GROUPS, world_size=8, cost=COST)
    twice = (PackingGroup(name="a", pack_len=64, cp_degree=2), PackingGroup(name="b", pack_len=128, cp_degree=2))
    with pytest.raises(ConfigError, match=r"cp_degrees \[2, 2\] must each be a multiple of the one before"):
        assign_mixed(np.array([5], dtype=np.int32), twice, world_size=8, cost=COST)

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_tune.data import TokenStore, open_token_store
from hbp_tune.errors import DataError, PackingError
from hbp_tune.planning import BalancePlanner, CostModel, EpochPlan, PackingGroup
from hbp_tune.training import plan_validation
from hbp_tune.training.validation import bucket_bounds, describe_validation
from tests.helpers import RandomTokens

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2))


def store_of(directory: Path, lengths: list[int]) -> TokenStore:
    return open_token_store([RandomTokens(lengths, 100, seed=1)], directory / "store")


@pytest.mark.parametrize(
    ("longest", "bounds"),
    [
        (2, [1024]),
        (1024, [1024]),
        (1026, [1024, 2048]),
        (8192, [1024, 2048, 4096, 8192]),
        (10_000, [1024, 2048, 4096, 8192, 16384]),
    ],
)
def test_buckets_double_until_they_hold_the_longest_pack(longest: int, bounds: list[int]) -> None:
    assert bucket_bounds(longest).tolist() == bounds


def test_samples_whose_targets_are_all_cut_away_are_dropped(tmp_path: Path) -> None:
    store = store_of(tmp_path, [250, 1000, 1000])  # a third of each sample is masked: its first 256 tokens have no target
    plan = plan_validation(BalancePlanner(overlong="truncate_end"), store, GROUPS, world_size=2, cost=CostModel())
    assert (sorted(plan.sample_ids.tolist()), plan.dropped.tolist()) == ([0], [1, 2])
    plan = plan_validation(BalancePlanner(overlong="truncate"), store, GROUPS, world_size=2, cost=CostModel())
    assert (sorted(plan.sample_ids.tolist()), plan.dropped.tolist()) == ([0, 1, 2], [])


def test_a_planner_of_the_user_s_needs_no_policy(tmp_path: Path) -> None:
    class Own:
        def plan(self, *arguments: Any, **named: Any) -> EpochPlan:
            return BalancePlanner().plan(*arguments, **named)

    plan = plan_validation(Own(), store_of(tmp_path, [250, 40]), GROUPS, world_size=2, cost=CostModel())
    assert sorted(plan.sample_ids.tolist()) == [0, 1]


def test_no_target_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset_val has no target: no sample has an assistant turn that counts"):
        plan_validation(
            BalancePlanner(overlong="truncate_end"), store_of(tmp_path, [1000, 900]), GROUPS, world_size=2, cost=CostModel()
        )


def test_errors_of_the_planner_say_which_data_they_are_about(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match=r"^dataset_val: sample 1 has 300 tokens, group 'long' holds 256"):
        plan_validation(BalancePlanner(), store_of(tmp_path, [10, 300]), GROUPS, world_size=2, cost=CostModel())


def test_the_plan_has_every_held_out_sample_once(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 257, 50).tolist()
    plan = plan_validation(BalancePlanner(), store_of(tmp_path, lengths), GROUPS, world_size=4, cost=CostModel())
    assert sorted(plan.sample_ids.tolist()) == list(range(50))


def test_the_line_for_people() -> None:
    metrics = {"val_loss": 2.5, "val_loss_len_1024": 2.25, "val_loss_code": 3.0}
    assert describe_validation(20, metrics) == "Validation after step 20: val_loss 2.5000, len_1024 2.2500, code 3.0000"

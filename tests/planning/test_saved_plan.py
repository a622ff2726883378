"""Whether a saved plan belongs to a run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.planner import BalancePlanner
from hbp_tune.components.planning.records import EpochPlan, PackingGroup, check_saved_plan

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2))
LENGTHS = np.array([10, 20, 30, 64, 200, 256, 300], dtype=np.int32)


def saved(overlong: str = "drop", epochs: int = 2) -> tuple[EpochPlan, ...]:
    planner = BalancePlanner(overlong=overlong)
    return tuple(planner.plan(LENGTHS, LENGTHS, GROUPS, world_size=2, seed=0, epoch=epoch) for epoch in range(epochs))


def check(epoch: int = 0, lengths: Any = LENGTHS, groups: Any = GROUPS, world_size: int = 2, overlong: str = "drop") -> EpochPlan:
    return check_saved_plan(saved(overlong), epoch, np.array(lengths, dtype=np.int32), groups, world_size=world_size)


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_plan_of_the_same_run_is_taken_as_it_is(overlong: str) -> None:
    for epoch in (0, 1):
        assert check(epoch, overlong=overlong).hash == saved(overlong)[epoch].hash


def test_recomputed_layers_are_the_runs() -> None:
    recomputing = (GROUPS[0], replace(GROUPS[1], ac_layers=3))
    plan = check(groups=recomputing)
    assert plan.groups == recomputing
    assert plan.hash == saved()[0].hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 2}, r"the saved plan has 2 epochs, the run has more; plan again with the run's epochs"),
        ({"world_size": 4}, r"the saved plan is for 2 ranks, the run has 4; plan again for these"),
        ({"groups": GROUPS[1:]}, r"has groups \[\('short', 64, 1\), .* the run \[\('long', 256, 2\)\]; plan again"),
        ({"groups": (GROUPS[0], replace(GROUPS[1], cp_degree=1))}, r"\('long', 256, 2\)\] .*the run .*\('long', 256, 1\)\]"),
        ({"lengths": LENGTHS[:-1]}, r"the saved plan holds 7 samples, the data 6; plan again with these data"),
        ({"lengths": [*LENGTHS, 5]}, r"the saved plan holds 7 samples, the data 8"),
        (
            {"lengths": [10, 20, 31, 64, 200, 256, 300]},
            r"sample 2 has 31 tokens, in the saved plan 30; the plan is of other data",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_plan_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**change)

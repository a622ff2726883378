import dataclasses
from typing import Any

import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup, check_groups, check_saved_plan


def test_a_group_is_valid_once_it_exists() -> None:
    group = PackingGroup(name="long", pack_len=131072, cp_degree=8, ac_layers=29)
    assert (group.pack_len, group.cp_degree, group.ac_layers) == (131072, 8, 29)
    short = PackingGroup(name="short", pack_len=16)
    assert (short.cp_degree, short.ac_layers, short.ac_mode) == (1, 0, "full")


def test_recomputation_for_people() -> None:
    group = PackingGroup(name="long", pack_len=64, ac_layers=29)
    assert group.describe_ac() == "29"
    assert dataclasses.replace(group, ac_mode="selective").describe_ac() == "29 selective"
    assert dataclasses.replace(group, ac_mode="offload").describe_ac() == "29 offload"
    assert dataclasses.replace(group, ac_mode="offload", ac_layers=0).describe_ac() == "0"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pack_len": 100, "cp_degree": 8}, r"group 'g': pack_len=100 must be a multiple of 2 \* cp_degree=16; round it up"),
        ({"pack_len": 0}, r"group 'g': pack_len=0 must be a whole number of at least 2"),
        ({"pack_len": 64.0}, r"pack_len=64.0 must be a whole number"),
        ({"pack_len": "64"}, r"pack_len='64' must be a whole number"),
        ({"pack_len": 64, "cp_degree": 0}, r"cp_degree=0 must be a whole number of at least 1"),
        ({"pack_len": 64, "ac_layers": -1}, r"ac_layers=-1 must be a whole number of at least 0"),
        (
            {"pack_len": 64, "ac_mode": "op"},
            r"group 'g': ac_mode='op' must be one of full, selective, offload; ac_layers=0 turns it off",
        ),
        ({"pack_len": 64, "ac_mode": None}, r"ac_mode=None must be one of full, selective, offload"),
    ],
)
def test_a_group_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackingGroup(name="g", **values)


def groups(*parts: tuple[str, int, int]) -> list[PackingGroup]:
    return [PackingGroup(name=name, pack_len=pack_len, cp_degree=cp) for name, pack_len, cp in parts]


@pytest.mark.parametrize(
    ("parts", "world_size", "message"),
    [
        ([], 2, r"groups is empty"),
        ([("a", 64, 1), ("a", 128, 1)], 2, r"groups \['a', 'a'\] must have different names"),
        ([("a", 128, 1), ("b", 64, 1)], 2, r"group 'b' has pack_len=64, not more than 128 of 'a' before it"),
        ([("a", 64, 1), ("b", 64, 1)], 2, r"group 'b' has pack_len=64, not more than 64"),
        ([("a", 64, 4)], 2, r"world size 2 is not a multiple of cp_degree=4 of group 'a'; start a multiple of 4 ranks"),
        ([("a", 48, 3)], 8, r"world size 8 is not a multiple of cp_degree=3"),
    ],
)
def test_groups_that_do_not_fit_together(parts: list[tuple[str, int, int]], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_groups(groups(*parts), world_size)


def test_groups_that_fit() -> None:
    check_groups(groups(("a", 64, 1), ("b", 128, 2), ("c", 256, 2)), 8)


@pytest.fixture
def plan() -> EpochPlan:
    """Two ranks: a short step of two micro-steps, whose last pack is empty, and a long step on both ranks."""
    return EpochPlan(
        groups=tuple(groups(("short", 8, 1), ("long", 16, 2))),
        world_size=2,
        sample_ids=np.array([3, 0, 1, 2, 4], dtype=np.int32),
        lengths=np.array([8, 4, 3, 5, 16], dtype=np.int32),
        pack_offsets=np.array([0, 1, 3, 4, 4, 5]),
        pack_group=np.array([0, 0, 0, 0, 1], dtype=np.int16),
        pack_step=np.array([0, 0, 0, 0, 1], dtype=np.int32),
        pack_micro_step=np.array([0, 0, 1, 1, 0], dtype=np.int16),
        pack_first_rank=np.array([0, 1, 0, 1, 0], dtype=np.int32),
        dropped=np.array([], dtype=np.int32),
        truncated=np.array([], dtype=np.int32),
    )


def test_a_plan_by_hand(plan: EpochPlan) -> None:
    assert (plan.num_packs, plan.num_steps) == (5, 2)
    assert plan.cp_degrees.tolist() == [1, 1, 1, 1, 2]
    assert plan.pack_of_sample.tolist() == [0, 1, 1, 2, 4]
    assert plan.sum_per_pack(plan.lengths).tolist() == [8, 7, 5, 0, 16]
    assert plan.sum_per_pack(np.full(5, 2**30, dtype=np.int32)).tolist() == [2**30, 2**31, 2**30, 0, 2**30]


@pytest.mark.parametrize(("rank", "sample_ids"), [(0, [[3], [2], [4]]), (1, [[0, 1], [], [4]])])
def test_each_rank_sees_its_part(plan: EpochPlan, rank: int, sample_ids: list[list[int]]) -> None:
    packs = list(plan.for_rank(rank))
    assert [pack.sample_ids.tolist() for pack in packs] == sample_ids
    assert [pack.lengths.sum() for pack in packs] == [[8, 5, 16], [7, 0, 16]][rank]
    assert [pack.index for pack in packs] == [[0, 2, 4], [1, 3, 4]][rank]
    assert [(pack.step, pack.micro_step) for pack in packs] == [(0, 0), (0, 1), (1, 0)]
    assert [pack.is_last_micro_step for pack in packs] == [False, True, True]
    assert [pack.cp_rank for pack in packs] == [0, 0, rank]
    assert [pack.group.name for pack in packs] == ["short", "short", "long"]


def test_windows_by_hand(plan: EpochPlan) -> None:
    assert plan.indices_for_rank(1).tolist() == [1, 3, 4]
    assert plan.indices_for_rank(1, first_step=1).tolist() == [4]
    assert plan.indices_for_rank(1, last_step=1).tolist() == [1, 3]
    assert plan.indices_for_rank(1, first_step=1, last_step=1).tolist() == []


def test_another_ranks_pack_is_refused(plan: EpochPlan) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 has no part in pack 0"):
        plan.pack(0, 1)


@pytest.mark.parametrize(
    "field", ["sample_ids", "lengths", "pack_offsets", "pack_group", "pack_step", "pack_micro_step", "pack_first_rank"]
)
def test_every_number_counts_in_the_hash(plan: EpochPlan, field: str) -> None:
    values = getattr(plan, field).copy()
    assert dataclasses.replace(plan, **{field: values}).hash == plan.hash
    values[-1] += 1
    assert dataclasses.replace(plan, **{field: values}).hash != plan.hash


def test_the_hash_tells_worlds_and_groups_apart(plan: EpochPlan) -> None:
    longer = tuple(groups(("short", 8, 1), ("long", 32, 2)))
    assert len({plan.hash, dataclasses.replace(plan, world_size=4).hash, dataclasses.replace(plan, groups=longer).hash}) == 3
    renamed = tuple(groups(("short", 8, 1), ("other", 16, 2)))
    assert dataclasses.replace(plan, groups=renamed).hash == plan.hash, "a name changes nothing that is trained"


DATA = np.array([4, 3, 5, 8, 16], dtype=np.int32)  # of `plan`


def test_a_saved_plan_is_taken_with_the_runs_recomputation(plan: EpochPlan) -> None:
    recomputing = [dataclasses.replace(group, ac_layers=3, ac_mode="selective") for group in plan.groups]
    taken = check_saved_plan([plan, plan], 1, DATA, recomputing, world_size=2)
    assert taken.hash == plan.hash
    assert [(group.ac_layers, group.ac_mode) for group in taken.groups] == [(3, "selective")] * 2


def test_a_saved_plan_may_cut_and_drop(plan: EpochPlan) -> None:
    cut = dataclasses.replace(plan, truncated=np.array([4], dtype=np.int32))
    assert check_saved_plan([cut], 0, np.array([4, 3, 5, 8, 90], dtype=np.int32), plan.groups, world_size=2).hash == cut.hash
    dropping = dataclasses.replace(plan, dropped=np.array([5], dtype=np.int32))
    assert check_saved_plan([dropping], 0, np.append(DATA, np.int32(90)), plan.groups, world_size=2).hash == plan.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 2}, r"the saved plan has 2 epochs, the run has more; plan again with the run's epochs"),
        ({"world_size": 4}, r"the saved plan is for 2 ranks, the run has 4; plan again for these"),
        (
            {"groups": groups(("short", 8, 1), ("long", 32, 2))},
            r"the saved plan has groups .*\('long', 16, 2\)\] .* the run .*'long', 32, 2\)\]; plan again",
        ),
        ({"lengths": DATA[:4]}, r"the saved plan holds 5 samples, the data 4; plan again with these data"),
        ({"lengths": np.append(DATA, DATA)}, r"the saved plan holds 5 samples, the data 10"),
        (
            {"lengths": np.array([4, 3, 5, 7, 16], dtype=np.int32)},
            r"sample 3 has 7 tokens, in the saved plan 8; the plan is of other data or lengths were estimated: plan again",
        ),
    ],
)
def test_a_saved_plan_of_another_run_is_refused(plan: EpochPlan, change: dict[str, Any], message: str) -> None:
    run = {"epoch": 0, "lengths": DATA, "groups": plan.groups, "world_size": 2} | change
    with pytest.raises(ConfigError, match=message):
        check_saved_plan([plan, plan], **run)


def test_a_saved_plan_of_as_many_other_samples_is_refused(plan: EpochPlan) -> None:
    beyond = dataclasses.replace(plan, sample_ids=np.array([3, 0, 1, 2, 5], dtype=np.int32))
    with pytest.raises(ConfigError, match=r"the saved plan holds sample 5, the data end at 4; plan again with these data"):
        check_saved_plan([beyond], 0, DATA, plan.groups, world_size=2)


def test_a_saved_plan_is_checked_against_the_draw(plan: EpochPlan) -> None:
    lengths = np.append(DATA, np.array([8, 90], dtype=np.int32))
    drawn = np.array([4, 3, 2, 1, 0], dtype=np.int32)
    assert check_saved_plan([plan], 0, lengths, plan.groups, world_size=2, sample_ids=drawn).hash == plan.hash
    repeated = dataclasses.replace(plan, dropped=np.array([6, 6], dtype=np.int32))
    drawn = np.array([0, 1, 2, 3, 4, 6, 6], dtype=np.int32)
    assert check_saved_plan([repeated], 0, lengths, plan.groups, world_size=2, sample_ids=drawn).hash == plan.hash
    with pytest.raises(ConfigError, match=r"^the saved plan holds 5 samples, the data 7; plan again with these data$"):
        check_saved_plan([plan], 0, lengths, plan.groups, world_size=2)
    # Sample 5 is as long as sample 3: lengths alone would not tell them apart.
    message = r"^the saved plan holds sample 3 1 times, the run draws it 0 times; plan again with the run's seed and weights$"
    with pytest.raises(ConfigError, match=message):
        check_saved_plan([plan], 0, lengths, plan.groups, world_size=2, sample_ids=np.array([0, 1, 2, 4, 5], dtype=np.int32))

import itertools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.comparison.baselines import ISF, NextFit, NoPacking
from hbp_tune.planning.comparison.metrics import measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.curriculum import Curriculum, Interleave, StepProfile
from hbp_tune.planning.packing.planner import BalancePlanner, targets_per_step
from hbp_tune.planning.packing.stages import ShortFirst
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from tests.planning.helpers import array, assert_lawful, chat_lengths, cost_doubling_at, rows_of

Groups = tuple[PackingGroup, ...]
Lengths = NDArray[np.int32]

both_modes = pytest.mark.parametrize("mode", ["cost", "paper"])


def plan_of(
    lengths: Lengths,
    groups: Sequence[PackingGroup],
    mode: str = "cost",
    *,
    world_size: int = 4,
    seed: int = 0,
    epoch: int = 0,
    cost: CostModel | None = None,
    curriculum: Curriculum | None = None,
    first_step: int = 0,
    sample_ids: Lengths | None = None,
    **arguments: object,
) -> EpochPlan:
    """Plan, with every token a target; ``arguments`` are the planner's."""
    return BalancePlanner(mode=mode, **arguments).plan(
        lengths,
        lengths,
        groups,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        cost=cost,
        curriculum=curriculum,
        first_step=first_step,
        sample_ids=sample_ids,
    )


def ids_in_group(plan: EpochPlan, index: int) -> list[int]:
    return sorted(plan.sample_ids[plan.pack_group[plan.pack_of_sample] == index].tolist())


# What holds in both modes


@both_modes
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_laws(two_groups: Groups, draw_lengths: Callable[[int], Lengths], seed: int, world_size: int, mode: str) -> None:
    lengths = draw_lengths(seed)
    arguments: dict[str, object] = {"tokens_per_step": [None, 300, 2000][seed % 3]}
    if mode == "paper":
        arguments |= {"fill": seed % 2 == 0, "sort_by": ["attention", "cost", "tokens", None][seed % 4]}
    cost = [CostModel(), cost_doubling_at(30)][seed % 2]

    def plan(lengths: Lengths, seed: int = seed, epoch: int = 0) -> EpochPlan:
        return plan_of(lengths, two_groups, mode, world_size=world_size, seed=seed, epoch=epoch, cost=cost, **arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again, next_epoch, other_seed = (
            plan(lengths),
            plan(lengths.copy()),
            plan(lengths, epoch=1),
            plan(lengths, seed + 100),
        )
    for each in (first, next_epoch, other_seed):
        assert_lawful(each, lengths)
    assert again.hash == first.hash
    if len(lengths) > 5:
        assert len({first.hash, next_epoch.hash, other_seed.hash}) == 3


@both_modes
@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("seed", range(20))
def test_laws_hold_for_any_groups(world_size: int, seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    pack_lens = np.unique(rng.integers(1, 30, rng.integers(1, 5))) * 2 * world_size
    degrees = [n for n in range(1, world_size + 1) if world_size % n == 0]
    groups = tuple(PackingGroup(name=str(n), pack_len=int(n), cp_degree=int(rng.choice(degrees))) for n in pack_lens)
    lengths = rng.integers(1, rng.choice([2, 10, pack_lens[-1] + 1, pack_lens[-1] + 5]), rng.integers(1, 80)).astype(np.int32)
    lengths[0] = pack_lens[-1] if seed % 2 else 1
    fitting = np.flatnonzero(lengths <= pack_lens[-1])
    before, cost = lengths.copy(), [CostModel(), cost_doubling_at(2), cost_doubling_at(50)][seed % 3]
    for overlong in ("drop", "truncate"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens_per_step = [None, 1, 100, 10**9][seed % 4]
            plan = plan_of(
                lengths,
                groups,
                mode,
                world_size=world_size,
                seed=seed,
                cost=cost,
                overlong=overlong,
                tokens_per_step=tokens_per_step,
            )
        assert_lawful(plan, lengths, fitting if overlong == "drop" else None)
        overlong_ids = np.flatnonzero(lengths > pack_lens[-1]).tolist()
        assert (plan.dropped if overlong == "drop" else plan.truncated).tolist() == overlong_ids
        assert (plan.truncated if overlong == "drop" else plan.dropped).tolist() == []
    assert np.array_equal(lengths, before), "the caller's lengths are its own"


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("cost", "3a24ad566de5ad0f"),
        ("paper", "03226e1e959694ba"),
    ],
)
def test_plans_are_the_same_on_every_machine(mode: str, want: str) -> None:
    lengths = (hashed_order(6000, seed=1, epoch=0, stream="test lengths") % 60 + 1).astype(np.int32)
    lengths[::50] *= 8
    groups = [PackingGroup(name="a", pack_len=256), PackingGroup(name="b", pack_len=512, cp_degree=2)]
    plan = plan_of(lengths, groups, mode, cost=cost_doubling_at(100), tokens_per_step=2048, seed=7, epoch=3)
    assert plan.hash[:16] == want


@both_modes
def test_seeds_and_epochs_pair_samples_differently(two_groups: Groups, mode: str) -> None:
    lengths = np.full(200, 30, dtype=np.int32)
    hashes = {plan_of(lengths, two_groups, mode, seed=seed, epoch=epoch).hash for seed in range(5) for epoch in range(5)}
    assert len(hashes) == 25


@both_modes
def test_hash_covers_groups_world_size_and_order(two_groups: Groups, mode: str) -> None:
    lengths = np.arange(1, 100, dtype=np.int32)
    plan = plan_of(lengths, two_groups, mode)
    whole = (two_groups[0], PackingGroup(name="long", pack_len=256))
    assert len({plan.hash, plan_of(lengths, whole, mode).hash, plan_of(lengths, two_groups, mode, world_size=8).hash}) == 3
    recomputing = (two_groups[0], PackingGroup(name="long", pack_len=256, cp_degree=2, ac_layers=1))
    assert plan_of(lengths, recomputing, mode).hash == plan.hash, "recomputation changes nothing that is trained"


@both_modes
def test_costs_are_those_of_llama_by_default(two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str) -> None:
    plan = plan_of(draw_lengths(4), two_groups, mode)
    assert plan.hash == plan_of(draw_lengths(4), two_groups, mode, cost=CostModel()).hash


@both_modes
@pytest.mark.parametrize(
    "lengths", [array(5), array(256), array(64, 64), array(1, 2, 3), np.full(33, 64, dtype=np.int32)], ids=lambda n: str(n[:3])
)
@pytest.mark.parametrize("world_size", [2, 8])
def test_few_or_equal_samples(two_groups: Groups, lengths: Lengths, world_size: int, mode: str) -> None:
    plan = plan_of(lengths, two_groups, mode, world_size=world_size)
    assert_lawful(plan, lengths)
    if len(lengths) <= world_size:
        assert plan.num_steps == 1


@both_modes
@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("length", [64, 33, 256, 129])
@pytest.mark.parametrize("num_samples", [1, 7, 8, 100])
def test_samples_that_cannot_share_a_pack(two_groups: Groups, num_samples: int, length: int, world_size: int, mode: str) -> None:
    # As long as their group's packs, or just over half of that.
    lengths, groups = np.full(num_samples, length, dtype=np.int32), two_groups[:1] if world_size == 1 else two_groups
    if world_size == 1 and length > 64:
        groups = (PackingGroup(name="all", pack_len=256),)
    plan = plan_of(lengths, groups, mode, world_size=world_size)
    assert_lawful(plan, lengths)
    assert np.diff(plan.pack_offsets).max() == 1
    replicas = world_size // plan.groups[plan.pack_group[0]].cp_degree
    assert plan.num_packs == -(-num_samples // replicas) * replicas, "no more empty packs than must be"


@both_modes
def test_one_rank_and_one_group(mode: str) -> None:
    plan = plan_of(array(3, 4, 5), (PackingGroup(name="all", pack_len=8),), mode, world_size=1)
    assert_lawful(plan, array(3, 4, 5))
    assert plan.num_steps == 2


@both_modes
def test_one_sample_leaves_the_other_ranks_an_empty_pack(mode: str) -> None:
    plan = plan_of(array(5), (PackingGroup(name="all", pack_len=8),), mode, world_size=8)
    assert sorted(np.diff(plan.pack_offsets).tolist()) == [0] * 7 + [1]
    assert [len(list(plan.for_rank(rank))) for rank in range(8)] == [1] * 8


@both_modes
def test_every_rank_shares_a_pack_where_the_degree_is_the_world_size(mode: str) -> None:
    plan = plan_of(array(16, 16, 7), (PackingGroup(name="all", pack_len=16, cp_degree=8),), mode, world_size=8)
    for rank in range(8):
        assert [(pack.index, pack.cp_rank) for pack in plan.for_rank(rank)] == [(0, rank), (1, rank), (2, rank)]


@both_modes
def test_no_replica_is_left_without_work(mode: str) -> None:
    # 65 samples of 10 fill 10 packs of 64 by sixes and leave 5: with 4 replicas 3 packs are left over.
    lengths = np.full(65, 10, dtype=np.int32)
    plan = plan_of(lengths, (PackingGroup(name="all", pack_len=64),), mode)
    assert (np.diff(plan.pack_offsets) > 0).all()
    assert_lawful(plan, lengths)


@both_modes
def test_tokens_per_step_decides_micro_steps_by_group(two_groups: Groups, mode: str) -> None:
    planner = BalancePlanner(tokens_per_step=1024, mode=mode)
    assert [planner.accumulation(group, 4) for group in two_groups] == [4, 2]
    assert [BalancePlanner(mode=mode).accumulation(group, 4) for group in two_groups] == [1, 1]
    plan = plan_of(np.full(4000, 16, dtype=np.int32), two_groups, mode, tokens_per_step=1024)
    tokens = np.bincount(plan.pack_step, weights=plan.sum_per_pack(plan.lengths))
    assert (np.abs(tokens - 1024) <= 256).all()


def test_a_micro_step_far_over_the_target_warns(two_groups: Groups) -> None:
    with pytest.warns(UserWarning, match=r"one micro-step of group 'long' holds 512 tokens, more than tokens_per_step=300"):
        assert BalancePlanner(tokens_per_step=300).accumulation(two_groups[1], 4) == 1


def test_a_micro_step_up_to_a_tenth_over_the_target_is_silent(two_groups: Groups) -> None:
    assert BalancePlanner(tokens_per_step=466).accumulation(two_groups[1], 4) == 1  # 512 is 9.9% more
    with pytest.warns(UserWarning, match=r"tokens_per_step=465; its optimizer steps are larger than asked"):
        assert BalancePlanner(tokens_per_step=465).accumulation(two_groups[1], 4) == 1
    assert BalancePlanner(tokens_per_step=767).accumulation(two_groups[1], 4) == 1
    assert BalancePlanner(tokens_per_step=768).accumulation(two_groups[1], 4) == 2


@both_modes
def test_a_group_without_samples_warns_of_nothing(two_groups: Groups, mode: str) -> None:
    plan = plan_of(array(64, 64), two_groups, mode, tokens_per_step=128, world_size=2)
    assert plan.pack_group.tolist() == [0, 0], "long packs would hold 256 tokens"


@both_modes
def test_overlong_samples_by_policy(two_groups: Groups, mode: str) -> None:
    lengths = array(10, 300, 20, 1000)
    dropped = plan_of(lengths, two_groups, mode, overlong="drop")
    assert_lawful(dropped, lengths, [0, 2])
    assert (dropped.dropped.tolist(), dropped.truncated.tolist()) == ([1, 3], [])
    cut = plan_of(lengths, two_groups, mode, overlong="truncate")
    assert_lawful(cut, lengths)
    assert (cut.dropped.tolist(), cut.truncated.tolist()) == ([], [1, 3])


@both_modes
def test_a_cut_sample_is_the_whole_of_its_pack(two_groups: Groups, mode: str) -> None:
    plan = plan_of(array(300, 400), two_groups, mode, overlong="truncate", world_size=2)
    assert plan.lengths.tolist() == [256, 256]
    assert plan.num_steps == 2


@both_modes
@pytest.mark.parametrize(
    ("lengths", "overlong", "message"),
    [
        (array(), "error", r"the data set is empty"),
        (array(4, 0), "error", r"sample 1 has 0 tokens, at least 1 is needed"),
        (array(9, 257), "error", r"sample 1 has 257 tokens, group 'long' holds 256.*1 of 2 samples.*planner.overlong=drop"),
        (
            array(300, 400),
            "drop",
            r"overlong=drop leaves no sample: 2 of 2 samples .* the longest has 400 tokens; first rows: 0",
        ),
    ],
)
def test_lengths_that_cannot_be_planned(two_groups: Groups, lengths: Lengths, overlong: str, message: str, mode: str) -> None:
    with pytest.raises(PackingError, match=message):
        plan_of(lengths, two_groups, mode, overlong=overlong)


@both_modes
def test_groups_that_cannot_be_planned(two_groups: Groups, mode: str) -> None:
    with pytest.raises(ConfigError, match=r"world size 3 is not a multiple of cp_degree=2 of group 'long'"):
        plan_of(array(5), two_groups, mode, world_size=3)
    with pytest.raises(ConfigError, match=r"groups is empty"):
        plan_of(array(5), (), mode)


@both_modes
def test_a_step_without_target_names_its_samples(two_groups: Groups, mode: str) -> None:
    lengths = np.full(40, 60, dtype=np.int32)
    with pytest.raises(PackingError, match=r"step \d+ has no target: none of its samples \[\d+, \d+.*\] has an assistant turn"):
        BalancePlanner(mode=mode).plan(lengths, np.where(np.arange(40) < 20, 5, 0), two_groups, world_size=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlong": "skip"}, r"overlong='skip' must be one of error, drop, truncate"),
        ({"tokens_per_step": 0}, r"planner.tokens_per_step=0 must be at least 1, or null for one micro-step"),
        ({"mode": "fast"}, r"planner.mode='fast' must be one of cost, paper"),
        ({"mode": "paper", "sort_by": "length"}, r"planner.sort_by='length' must be attention, cost, tokens or null"),
        ({"packer": NextFit()}, r"planner.packer, fill and sort_by belong to planner.mode=paper; set that, or leave them out"),
        ({"fill": False}, r"belong to planner.mode=paper"),
        ({"sort_by": None}, r"belong to planner.mode=paper"),
    ],
)
def test_a_planner_that_cannot_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BalancePlanner(**arguments)


@both_modes
def test_curriculum_orders_steps_and_changes_nothing_else(
    two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str
) -> None:
    lengths = np.concatenate([draw_lengths(seed) for seed in range(4)])
    plain = plan_of(lengths, two_groups, mode)
    ordered = plan_of(lengths, two_groups, mode, curriculum=ShortFirst(steps=5))
    assert_lawful(ordered, lengths)
    assert sorted(rows_of(ordered)) == sorted(rows_of(plain))
    assert (ordered.pack_group[ordered.pack_step < 5] == 0).all()
    assert (plain.pack_group[plain.pack_step < 5] == 1).any()


def test_a_curriculum_by_documents_keeps_long_ones_out_of_one_length_packs() -> None:
    # ISF to one length, as the paper compares with: 40 documents of half a pack or more among 4,000 short ones.
    rng = np.random.default_rng(0)
    lengths = np.concatenate((rng.integers(20, 400, 4000), rng.integers(4096, 8193, 40))).astype(np.int32)
    groups = [PackingGroup(name="all", pack_len=8192)]

    def longest_of_steps(curriculum: ShortFirst | None) -> list[int]:
        plan = plan_of(lengths, groups, "paper", packer=ISF(), fill=False, sort_by=None, curriculum=curriculum)
        assert_lawful(plan, lengths)
        step = plan.pack_step[plan.pack_of_sample]
        return [int(plan.lengths[step == i].max()) for i in range(plan.num_steps)]

    plain, ordered = longest_of_steps(None), longest_of_steps(ShortFirst(steps=8, max_len=4095))
    assert sorted(ordered) == sorted(plain), "the same steps"
    assert max(ordered[:8]) < 4096 <= max(plain[:8])


@both_modes
def test_a_curriculum_is_told_seed_and_epoch(two_groups: Groups, mode: str) -> None:
    lengths = np.array([64] * 40 + [256] * 20, dtype=np.int32)
    for seed, epoch in ((0, 0), (3, 0), (0, 2)):
        plan = plan_of(lengths, two_groups, mode, seed=seed, epoch=epoch, world_size=2, curriculum=Interleave("random"))
        order = hashed_order(40, seed=seed, epoch=epoch, stream="curriculum from step 0")
        assert plan.step_groups.tolist() == (order >= 20).astype(int).tolist(), "20 short steps, then 20 long ones"


@both_modes
def test_a_curriculum_counts_the_steps_of_earlier_epochs(two_groups: Groups, mode: str) -> None:
    lengths = np.array([64] * 16 + [256] * 16, dtype=np.int32)
    trained = {}
    for first_step in (0, 3, 5):
        plan = plan_of(lengths, two_groups, mode, world_size=2, epoch=1, curriculum=ShortFirst(steps=5), first_step=first_step)
        trained[first_step] = int(np.argmax(plan.pack_group == 1)) // 2  # short steps before the first long one
    assert trained == {0: 5, 3: 2, 5: 0}


@both_modes
def test_a_curriculum_sees_lengths_of_packs_and_documents(
    two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str
) -> None:
    seen: list[StepProfile] = []

    class Recording(Interleave):
        def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
            assert (first_step, epoch, seed) == (7, 2, 5)
            seen.append(steps.take(super().order(steps, first_step=first_step, epoch=epoch, seed=seed)))
            return super().order(steps, first_step=first_step, epoch=epoch, seed=seed)

    lengths = np.append(draw_lengths(3), array(300))
    plan = plan_of(
        lengths,
        two_groups,
        mode,
        seed=5,
        epoch=2,
        first_step=7,
        curriculum=Recording(),
        overlong="truncate",
        tokens_per_step=1000,
    )
    step = plan.pack_step[plan.pack_of_sample]
    assert seen[0].pack_lens.tolist() == [two_groups[i].pack_len for i in plan.step_groups]
    assert seen[0].longest.tolist() == [int(plan.lengths[step == i].max()) for i in range(plan.num_steps)]
    assert seen[0].longest.dtype == np.int32


@both_modes
def test_groups_alternate_in_proportion(two_groups: Groups, mode: str) -> None:
    lengths = np.array([64] * 40 + [256] * 20, dtype=np.int32)
    plan = plan_of(lengths, two_groups, mode, world_size=2)
    group_of_step = plan.pack_group[np.searchsorted(plan.pack_step, np.arange(plan.num_steps))]
    assert group_of_step.tolist() == [0, 1] * 20


@both_modes
def test_steps_of_a_group_are_shuffled_by_seed_and_epoch(mode: str) -> None:
    # Every pack is one sample and has its own length: only the order of steps can differ.
    lengths, groups = np.arange(33, 65, dtype=np.int32), (PackingGroup(name="all", pack_len=64),)
    cost = cost_doubling_at(1)
    plans = [
        plan_of(lengths, groups, mode, world_size=2, seed=seed, epoch=epoch, cost=cost)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    steps = [[tuple(sorted(pair)) for pair in plan.sample_ids.reshape(-1, 2).tolist()] for plan in plans]
    if mode == "paper":
        assert sorted(steps[0]) == [(i, i + 1) for i in range(0, 32, 2)], "neighbours by attention work share a step"
        assert all(sorted(other) == sorted(steps[0]) for other in steps)
    assert len({tuple(order) for order in [*steps, sorted(steps[0])]}) == 5


@both_modes
def test_windows_of_steps(two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str) -> None:
    plan = plan_of(draw_lengths(3), two_groups, mode)
    whole = plan.indices_for_rank(2).tolist()
    split = [plan.indices_for_rank(2, last_step=3).tolist(), plan.indices_for_rank(2, first_step=3).tolist()]
    assert split[0] + split[1] == whole
    assert all(split)


@both_modes
def test_targets_of_each_step(two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str) -> None:
    plan = plan_of(draw_lengths(5), two_groups, mode)
    num_targets = np.arange(1, len(plan.sample_ids) + 1)
    want = [
        sum(int(num_targets[i]) for row, of in zip(rows_of(plan), plan.pack_step, strict=True) if of == step for i in row)
        for step in range(plan.num_steps)
    ]
    assert targets_per_step(plan, num_targets).tolist() == want


# Draws


@both_modes
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("seed", range(10))
def test_drawn_samples_are_planned_as_often_as_drawn(
    two_groups: Groups, draw_lengths: Callable[[int], Lengths], seed: int, overlong: str, mode: str
) -> None:
    lengths = np.append(draw_lengths(seed), array(300, 280))
    drawn = np.random.default_rng(seed).choice(len(lengths), 2 * len(lengths)).astype(np.int32)
    drawn = np.append(drawn, array(len(lengths) - 1, len(lengths) - 1))
    plan = plan_of(lengths, two_groups, mode, overlong=overlong, seed=seed, sample_ids=drawn)
    is_overlong = lengths[drawn] > 256
    placed = drawn[~is_overlong] if overlong == "drop" else drawn
    assert_lawful(plan, lengths, np.sort(placed).tolist())
    assert (plan.dropped if overlong == "drop" else plan.truncated).tolist() == np.sort(drawn[is_overlong]).tolist()


@both_modes
def test_the_default_draw_is_every_sample_once(two_groups: Groups, draw_lengths: Callable[[int], Lengths], mode: str) -> None:
    lengths = draw_lengths(5)
    every = np.arange(len(lengths), dtype=np.int32)
    assert plan_of(lengths, two_groups, mode).hash == plan_of(lengths, two_groups, mode, sample_ids=every).hash


@both_modes
def test_errors_name_drawn_samples_by_their_ids(two_groups: Groups, mode: str) -> None:
    lengths = array(10, 300, 20, 0)
    with pytest.raises(PackingError, match=r"sample 1 has 300 tokens, group 'long' holds 256"):
        plan_of(lengths, two_groups, mode, sample_ids=array(0, 0, 0, 2, 1))
    with pytest.raises(PackingError, match=r"sample 3 has 0 tokens"):
        plan_of(lengths, two_groups, mode, sample_ids=array(2, 2, 3))
    assert_lawful(plan_of(lengths, two_groups, mode, sample_ids=array(0, 2)), lengths, [0, 2])
    with pytest.raises(PackingError, match=r"none of its samples \[7, 7\] has an assistant turn"):
        BalancePlanner(mode=mode).plan(
            np.full(8, 60, dtype=np.int32),
            np.zeros(8, dtype=np.int32),
            two_groups,
            world_size=2,
            seed=0,
            sample_ids=array(7, 7),
        )


# Paper mode


def test_samples_go_to_the_shortest_group_that_holds_them(two_groups: Groups) -> None:
    plan = plan_of(array(64, 65, 256, 1), two_groups, "paper", fill=False, world_size=2)
    assert [ids_in_group(plan, index) for index in range(2)] == [[0, 3], [1, 2]]


def test_greedy_fill_takes_short_samples_into_the_room_of_long_packs(two_groups: Groups) -> None:
    plan = plan_of(array(250, 6, 7), two_groups, "paper", world_size=2)
    assert ids_in_group(plan, 1) == [0, 1]


def test_room_goes_to_the_next_shorter_group_first() -> None:
    groups = tuple(PackingGroup(name=name, pack_len=n) for name, n in (("a", 8), ("b", 16), ("c", 64)))
    # 48 leaves 16 in c: b's 12 comes before a's 8, then 4 of a fits beside it.
    plan = plan_of(array(8, 4, 12, 48), groups, "paper", world_size=1)
    assert ids_in_group(plan, 2) == [1, 2, 3]
    assert ids_in_group(plan, 0) == [0]
    assert not (plan.pack_group == 1).any(), "a group whose samples were all taken has no step"
    unfilled = plan_of(array(8, 4, 12, 48), groups, "paper", world_size=1, fill=False)
    assert sorted(unfilled.pack_group.tolist()) == [0, 0, 1, 2]


def test_a_plan_by_hand(two_groups: Groups) -> None:
    # Attention decides the pairs: 64**2 beside 64**2, and 2 * 32**2 beside 2 * 32**2, whatever the shuffle.
    plan = plan_of(array(32, 64, 32, 256, 64, 32, 32), two_groups, "paper", world_size=2, seed=3)
    assert plan.pack_first_rank.tolist() == [0, 1, 0, 0, 1]
    assert plan.pack_group.tolist() == [0, 0, 1, 0, 0]
    assert plan.pack_step.tolist() == [0, 0, 1, 2, 2]
    assert plan.pack_micro_step.tolist() == [0] * 5
    packs = rows_of(plan)
    steps = [sorted(itertools.chain(*packs[i:j])) for i, j in ((0, 2), (2, 3), (3, 5))]
    assert steps[1] == [3]
    assert sorted([steps[0], steps[2]]) == [[0, 2, 5, 6], [1, 4]]


def test_neighbours_have_in_common_what_is_sorted_by() -> None:
    packs = {"a": (2, 2, 2, 2), "b": (5,), "c": (4, 3, 2), "d": (7,)}  # 8, 5, 9, 7 tokens; squares 16, 25, 29, 49
    lengths, groups = array(*itertools.chain(*packs.values())), (PackingGroup(name="all", pack_len=16),)

    class ByHand:
        def place(self, lengths: Lengths, pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
            return np.repeat(np.arange(4), [len(pack) for pack in packs.values()])

    def steps(sort_by: str | None, double_len: int = 2, seed: int = 0) -> list[str]:
        cost = cost_doubling_at(double_len)
        plan = plan_of(lengths, groups, "paper", world_size=2, sort_by=sort_by, packer=ByHand(), cost=cost, seed=seed)
        names = [name for row in rows_of(plan) for name, pack in packs.items() if tuple(lengths[row]) == pack]
        return sorted("".join(sorted(names[i : i + 2])) for i in (0, 2))

    assert steps("attention") == ["ab", "cd"]
    assert steps("tokens") == ["ac", "bd"]
    assert steps("cost", double_len=2) == ["ab", "cd"], "32, 35, 47, 63"
    assert steps("cost", double_len=40) == ["ac", "bd"], "336, 225, 389, 329"
    assert len({tuple(steps(None, seed=seed)) for seed in range(20)}) == 3, "any two packs"


def test_a_packer_of_ones_own_places_the_samples() -> None:
    lengths, groups = array(5, 3, 4, 4, 8, 1, 7, 2), (PackingGroup(name="all", pack_len=8),)
    plan = plan_of(lengths, groups, "paper", world_size=1, packer=NextFit())
    assert sorted(rows_of(plan)) == [[0, 1], [2, 3], [4], [5, 6], [7]]
    plan = plan_of(lengths, groups, "paper", world_size=1, packer=NoPacking(), sort_by=None)
    assert sorted(rows_of(plan)) == [[i] for i in range(8)]


def test_a_packer_is_given_samples_in_the_order_of_the_data_set(two_groups: Groups) -> None:
    given = []

    class Recording(NoPacking):
        def place(self, lengths: Lengths, pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
            given.append((pack_len, lengths.tolist(), seed, epoch))
            return super().place(lengths, pack_len, seed=seed, epoch=epoch)

    plan_of(array(9, 200, 7, 256, 8), two_groups, "paper", packer=Recording(), fill=False, seed=5, epoch=2)
    assert given == [(256, [200, 256], 5, 2), (64, [9, 7, 8], 5, 2)]


def test_packs_are_sorted_within_a_real_mixture() -> None:
    lengths, groups = chat_lengths(20_000, 16_384), [PackingGroup(name="all", pack_len=16_384)]
    metrics = measure(plan_of(lengths, groups, "paper", world_size=8), CostModel())
    assert metrics.abr < 0.03
    assert metrics.pr < 0.001


# Cost mode


def by_micro_step(plan: EpochPlan, cost: CostModel, group: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cost of each pack of a group, a row for each micro-step, and the step of each micro-step."""
    mine = plan.pack_group == group
    costs = plan.sum_per_pack(cost.sample_cost(plan.lengths))[mine]
    replicas = plan.world_size // plan.groups[group].cp_degree
    return costs.reshape(-1, replicas), plan.pack_step[mine][::replicas]


def test_samples_go_to_a_group_that_they_do_not_hold_up() -> None:
    groups = PackingGroup(name="short", pack_len=20), PackingGroup(name="long", pack_len=64, cp_degree=2)
    lengths = array(*[2] * 300, 20, 10, 64)
    plan = plan_of(lengths, groups, cost=cost_doubling_at(10), world_size=8)
    assert 300 in ids_in_group(plan, 1), "20 tokens cost 600, a pack of 2s at most 240"
    assert 301 in ids_in_group(plan, 0)
    assert 302 in ids_in_group(plan, 1)


def test_idle_time_beside_long_samples_goes_to_the_next_shorter_group_first() -> None:
    groups = tuple(PackingGroup(name=name, pack_len=n) for name, n in (("a", 8), ("b", 16), ("c", 64)))
    # Beside 60 tokens, 30 leave a gap of about as many: b's 16 and 10 fit, and then 2 of a, but not 8.
    plan = plan_of(array(60, 30, 16, 10, 8, 2), groups, cost=cost_doubling_at(10_000), world_size=2)
    assert ids_in_group(plan, 2) == [0, 1, 2, 3, 5]
    assert ids_in_group(plan, 0) == [4]


@pytest.mark.parametrize("seed", range(5))
def test_steps_cost_the_same_without_a_partial_one(seed: int) -> None:
    lengths, groups, cost = chat_lengths(20_000, 16_384, seed), [PackingGroup(name="all", pack_len=16_384)], CostModel()
    plan = plan_of(lengths, groups, world_size=8, seed=seed)
    costs, steps = by_micro_step(plan, cost)
    assert steps.tolist() == list(range(plan.num_steps))
    assert costs.sum(axis=1).min() > 0.98 * costs.sum(axis=1).mean()
    # The few samples that cost more than a mean pack lift their step's cost; the others are level.
    is_level = costs.sum(axis=1) < 1.02 * costs.sum(axis=1).mean()
    assert is_level.mean() > 0.9
    assert (1 - costs.mean(axis=1) / costs.max(axis=1))[is_level].max() < 0.005
    metrics = measure(plan, cost)
    assert metrics.p99_imbalance < 0.03
    assert metrics.idle < 0.005
    assert metrics.pr_tail == 0
    assert plan.num_steps <= 1.04 * lengths.sum() / (8 * 16_384) + 1


@pytest.mark.parametrize("micro_steps", [2, 4, 7])
def test_micro_steps_of_steps_differ_by_one_at_most(micro_steps: int) -> None:
    lengths, groups = chat_lengths(20_000, 16_384, sigma=1.2), [PackingGroup(name="all", pack_len=16_384)]
    plan = plan_of(lengths, groups, world_size=8, tokens_per_step=micro_steps * 8 * 16_384)
    costs, steps = by_micro_step(plan, CostModel())
    counts = np.bincount(steps)
    assert counts.max() - counts.min() <= 1
    assert abs(len(steps) / micro_steps - len(counts)) <= 0.5
    # Each step has light and heavy micro-steps: costs per micro-step differ less than those of micro-steps.
    per_step = np.bincount(steps, weights=costs.sum(axis=1)) / counts
    assert per_step.std() < costs.sum(axis=1).std()


@pytest.mark.parametrize("seed", range(5))
def test_long_samples_are_levelled(seed: int) -> None:
    groups = [PackingGroup(name="short", pack_len=16_384), PackingGroup(name="long", pack_len=131_072, cp_degree=8)]
    long = np.random.default_rng(seed).integers(16_385, 131_073, 100).astype(np.int32)
    lengths, cost = np.concatenate((chat_lengths(20_000, 16_384, seed), long)), CostModel()
    plan = plan_of(lengths, groups, world_size=32, seed=seed)
    assert_lawful(plan, lengths)
    costs, _ = by_micro_step(plan, cost, group=1)
    assert costs.shape[1] == 4
    idle = 1 - costs.mean(axis=1) / costs.max(axis=1)
    assert idle.max() < 0.05
    assert idle.mean() < 0.01
    by_length = plan_of(lengths, groups, "paper", world_size=32, seed=seed)
    assert measure(plan, cost).idle < 0.3 * measure(by_length, cost).idle


def test_random_windows_decide_the_steps() -> None:
    # A step's samples are neighbours in the hashed order: about 128 packs are dealt together.
    lengths, groups = chat_lengths(20_000, 8192), [PackingGroup(name="all", pack_len=16_384)]
    plan = plan_of(lengths, groups, world_size=8, seed=3, epoch=1)
    position = np.argsort(hashed_order(20_000, seed=3, epoch=1, stream="samples"))
    spans = [np.ptp(position[plan.sample_ids[plan.pack_step[plan.pack_of_sample] == step]]) for step in range(plan.num_steps)]
    assert max(spans) < 1.5 * 20_000 * 16 / plan.num_steps


@pytest.mark.parametrize("num_samples", [100, 1000, 3000])
def test_small_data_sets_fill_their_packs(num_samples: int) -> None:
    lengths, groups = chat_lengths(num_samples, 8192), [PackingGroup(name="all", pack_len=16_384)]
    plan = plan_of(lengths, groups, world_size=8)
    assert plan.num_steps <= -(-int(lengths.sum()) // (8 * 16_384)) + 1


class _BrokenPacker:
    """Breaks the contract of a packer."""

    def __init__(self, places: list[int]) -> None:
        self._places = places

    def place(self, lengths: Lengths, pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        return np.array(self._places)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 0], r"_BrokenPacker overfills a pack of group 'short': a pack holds pack_len=64 tokens"),
        ([0, 2], r"_BrokenPacker leaves empty a pack of group 'short': .* numbered from 0 without gaps; mend its place\(\)"),
    ],
)
def test_a_packer_that_breaks_its_contract_is_named(two_groups: Groups, places: list[int], message: str) -> None:
    with pytest.raises(PackingError, match=message):
        plan_of(array(40, 40), two_groups, mode="paper", packer=_BrokenPacker(places))

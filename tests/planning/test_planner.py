import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.components.planning.curriculum import ShortFirst
from hbp_tune.components.planning.errors import ConfigError, PackingError
from hbp_tune.components.planning.planner import BalancePlanner, compare_with_naive, targets_per_step
from hbp_tune.components.planning.records import EpochPlan, PackingGroup

Groups = tuple[PackingGroup, ...]
Lengths = NDArray[np.int32]


def plan_of(lengths: Lengths, groups: Groups, planner: BalancePlanner | None = None, **kwargs: int) -> EpochPlan:
    return (planner or BalancePlanner()).plan(lengths, lengths, groups, **({"seed": 0, "world_size": 4} | kwargs))


def array(*values: int) -> Lengths:
    return np.array(values, dtype=np.int32)


def assert_lawful(plan: EpochPlan, lengths: Lengths, placed: list[int]) -> None:
    """Check what holds for every plan, whatever its input."""
    assert sorted(plan.sample_ids.tolist()) == placed, "every sample exactly once"
    assert plan.lengths.tolist() == np.minimum(lengths, plan.groups[-1].pack_len)[plan.sample_ids].tolist()
    pack_lens = np.array([group.pack_len for group in plan.groups])
    assert (plan.sum_per_pack(plan.lengths) <= pack_lens[plan.pack_group]).all(), "no pack over its length"
    assert plan.sum_per_pack(plan.lengths).sum() == plan.lengths.sum()
    schedules = []
    for rank in range(plan.world_size):
        packs = list(plan.for_rank(rank))
        schedules.append([(pack.step, pack.micro_step, pack.group, pack.is_last_micro_step) for pack in packs])
    assert all(schedule == schedules[0] for schedule in schedules), "one pack per rank and micro-step, of one group"
    steps = [entry[0] for entry in schedules[0]]
    assert sorted(set(steps)) == list(range(plan.num_steps))
    for step in range(plan.num_steps):
        entries = [entry for entry in schedules[0] if entry[0] == step]
        assert len({entry[2] for entry in entries}) == 1, "a step draws from one group"
        assert [entry[1] for entry in entries] == list(range(len(entries)))
        assert [entry[3] for entry in entries] == [False] * (len(entries) - 1) + [True]


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_laws(two_groups: Groups, draw_lengths: Callable[[int], Lengths], seed: int, world_size: int) -> None:
    lengths = draw_lengths(seed)
    planner = BalancePlanner(tokens_per_step=[None, 300, 2000][seed % 3], fill=seed % 2 == 0, balance=seed % 5 > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_of(lengths, two_groups, planner=planner, world_size=world_size, seed=seed)
        again = plan_of(lengths.copy(), two_groups, planner=planner, world_size=world_size, seed=seed)
        next_epoch = plan_of(lengths, two_groups, planner=planner, world_size=world_size, seed=seed, epoch=1)
    assert_lawful(plan, lengths, list(range(len(lengths))))
    assert_lawful(next_epoch, lengths, list(range(len(lengths))))
    assert again.hash == plan.hash
    assert next_epoch.hash != plan.hash or len(lengths) < 5


def test_samples_go_to_the_shortest_group_that_holds_them(two_groups: Groups) -> None:
    lengths = array(64, 65, 256, 1)
    plan = plan_of(lengths, two_groups, planner=BalancePlanner(fill=False), world_size=2)
    group_of = dict(zip(plan.sample_ids.tolist(), plan.pack_group[plan.pack_of_sample].tolist(), strict=True))
    assert group_of == {0: 0, 1: 1, 2: 1, 3: 0}


def test_greedy_fill_takes_short_samples_into_the_room_of_long_packs(two_groups: Groups) -> None:
    plan = plan_of(array(250, 6, 7), two_groups, world_size=2)
    long = plan.sample_ids[plan.pack_group[plan.pack_of_sample] == 1]
    assert sorted(long.tolist()) == [0, 1]


def test_seeds_and_epochs_pair_samples_differently(two_groups: Groups) -> None:
    lengths = np.full(200, 30, dtype=np.int32)
    hashes = {plan_of(lengths, two_groups, seed=seed, epoch=epoch).hash for seed in range(5) for epoch in range(5)}
    assert len(hashes) == 25


def test_hash_covers_groups_world_size_and_order(two_groups: Groups) -> None:
    lengths = np.arange(1, 100, dtype=np.int32)
    plan = plan_of(lengths, two_groups)
    whole = (two_groups[0], PackingGroup(name="long", pack_len=256))
    assert len({plan.hash, plan_of(lengths, whole).hash, plan_of(lengths, two_groups, world_size=8).hash}) == 3
    recomputing = (two_groups[0], PackingGroup(name="long", pack_len=256, cp_degree=2, ac_layers=1))
    assert plan_of(lengths, recomputing).hash == plan.hash, "recomputation changes nothing that is trained"


@pytest.mark.parametrize("lengths", [array(5), array(256), array(64, 64), np.full(33, 64, dtype=np.int32)], ids=str)
@pytest.mark.parametrize("world_size", [2, 8])
def test_few_or_equal_samples(two_groups: Groups, lengths: Lengths, world_size: int) -> None:
    plan = plan_of(lengths, two_groups, world_size=world_size)
    assert_lawful(plan, lengths, list(range(len(lengths))))


def test_one_rank_and_one_group() -> None:
    plan = plan_of(array(3, 4, 5), (PackingGroup(name="all", pack_len=8),), world_size=1)
    assert_lawful(plan, array(3, 4, 5), [0, 1, 2])
    assert plan.num_steps == 2


def test_a_tail_is_spread_over_all_replicas() -> None:
    # 65 samples of 10 fill 10 packs of 64 by sixes and leave 5: with 4 replicas 3 packs are left over.
    lengths = np.full(65, 10, dtype=np.int32)
    plan = plan_of(lengths, (PackingGroup(name="all", pack_len=64),), world_size=4)
    assert (np.diff(plan.pack_offsets) > 0).all()
    assert_lawful(plan, lengths, list(range(65)))


def test_tokens_per_step_decides_micro_steps_by_group(two_groups: Groups) -> None:
    planner = BalancePlanner(tokens_per_step=1024)
    assert [planner.accumulation(group, 4) for group in two_groups] == [4, 2]
    assert [BalancePlanner().accumulation(group, 4) for group in two_groups] == [1, 1]
    plan = plan_of(np.full(400, 16, dtype=np.int32), two_groups, planner=planner)
    tokens = np.bincount(plan.pack_step, weights=plan.sum_per_pack(plan.lengths))
    assert (np.abs(tokens - 1024) <= 256).all()


def test_a_micro_step_far_over_the_target_warns(two_groups: Groups) -> None:
    with pytest.warns(UserWarning, match=r"one micro-step of group 'long' holds 512 tokens, more than tokens_per_step=300"):
        assert BalancePlanner(tokens_per_step=300).accumulation(two_groups[1], 4) == 1


def test_overlong_samples_by_policy(two_groups: Groups) -> None:
    lengths = array(10, 300, 20, 1000)
    dropped = plan_of(lengths, two_groups, planner=BalancePlanner(overlong="drop"))
    assert_lawful(dropped, lengths, [0, 2])
    assert (dropped.dropped.tolist(), dropped.truncated.tolist()) == ([1, 3], [])
    cut = plan_of(lengths, two_groups, planner=BalancePlanner(overlong="truncate"))
    assert_lawful(cut, lengths, [0, 1, 2, 3])
    assert (cut.dropped.tolist(), cut.truncated.tolist()) == ([], [1, 3])


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
def test_lengths_that_cannot_be_planned(two_groups: Groups, lengths: Lengths, overlong: str, message: str) -> None:
    with pytest.raises(PackingError, match=message):
        plan_of(lengths, two_groups, planner=BalancePlanner(overlong=overlong))


def test_a_step_without_target_names_its_samples(two_groups: Groups) -> None:
    lengths = np.full(40, 60, dtype=np.int32)
    with pytest.raises(PackingError, match=r"step \d+ has no target: none of its samples \[\d+, \d+.*\] has an assistant turn"):
        BalancePlanner().plan(lengths, np.where(np.arange(40) < 20, 5, 0), two_groups, world_size=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlong": "skip"}, r"overlong='skip' must be one of error, drop, truncate"),
        ({"tokens_per_step": 0}, r"planner.tokens_per_step=0 must be at least 1"),
    ],
)
def test_a_planner_that_cannot_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BalancePlanner(**arguments)


def test_curriculum_orders_steps_and_changes_nothing_else(two_groups: Groups, draw_lengths: Callable[[int], Lengths]) -> None:
    lengths = np.concatenate([draw_lengths(seed) for seed in range(4)])
    plain = plan_of(lengths, two_groups)
    ordered = BalancePlanner().plan(lengths, lengths, two_groups, world_size=4, seed=0, curriculum=ShortFirst(steps=5))
    assert_lawful(ordered, lengths, list(range(len(lengths))))

    def packs(plan: EpochPlan) -> list[list[int]]:
        return sorted(ids.tolist() for ids in np.split(plan.sample_ids, plan.pack_offsets[1:-1]))

    assert packs(ordered) == packs(plain)
    assert (ordered.pack_group[ordered.pack_step < 5] == 0).all()
    assert (plain.pack_group[plain.pack_step < 5] == 1).any()


def test_a_curriculum_counts_the_steps_of_earlier_epochs(two_groups: Groups) -> None:
    lengths = np.array([64] * 16 + [256] * 16, dtype=np.int32)
    trained = {}
    for first_step in (0, 3, 5):
        plan = BalancePlanner().plan(
            lengths, lengths, two_groups, world_size=2, seed=0, epoch=1, curriculum=ShortFirst(steps=5), first_step=first_step
        )
        trained[first_step] = int(np.argmax(plan.pack_group == 1)) // 2  # short steps before the first long one
    assert trained == {0: 5, 3: 2, 5: 0}


def test_steps_of_a_group_are_shuffled_by_seed_and_epoch() -> None:
    # Every pack is one sample and has its own length: only the order of steps can differ.
    lengths, groups = np.arange(33, 65, dtype=np.int32), (PackingGroup(name="all", pack_len=64),)
    plans = [plan_of(lengths, groups, world_size=2, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    steps = [[tuple(pair) for pair in plan.sample_ids.reshape(-1, 2).tolist()] for plan in plans]
    assert sorted(steps[0]) == [(i, i + 1) for i in range(0, 32, 2)], "neighbours by attention work share a step"
    assert all(sorted(other) == sorted(steps[0]) for other in steps)
    assert len({tuple(order) for order in [*steps, sorted(steps[0])]}) == 5


def test_windows_of_steps(two_groups: Groups, draw_lengths: Callable[[int], Lengths]) -> None:
    plan = plan_of(draw_lengths(3), two_groups)
    whole = plan.indices_for_rank(2).tolist()
    split = [plan.indices_for_rank(2, last_step=3).tolist(), plan.indices_for_rank(2, first_step=3).tolist()]
    assert split[0] + split[1] == whole
    assert all(split)


def test_targets_of_each_step(two_groups: Groups, draw_lengths: Callable[[int], Lengths]) -> None:
    plan = plan_of(draw_lengths(5), two_groups)
    num_targets = np.arange(1, len(plan.sample_ids) + 1)
    want = [
        sum(
            num_targets[i]
            for p in range(plan.num_packs)
            if plan.pack_step[p] == step
            for i in plan.sample_ids[plan.pack_offsets[p] : plan.pack_offsets[p + 1]]
        )
        for step in range(plan.num_steps)
    ]
    assert targets_per_step(plan, num_targets).tolist() == want


def test_comparison_adds_ranks_where_one_pack_takes_all(two_groups: Groups, draw_lengths: Callable[[int], Lengths]) -> None:
    lengths = draw_lengths(1)
    names = {n: list(compare_with_naive(BalancePlanner(), lengths, two_groups, world_size=n, seed=0)) for n in (2, 4)}
    assert names == {2: ["HBP", "one length", "HBP on 8 ranks", "one length on 8 ranks"], 4: ["HBP", "one length"]}


def test_a_plan_by_hand(two_groups: Groups) -> None:
    # Attention decides the pairs: 64**2 beside 64**2, and 2 * 32**2 beside 2 * 32**2, whatever the shuffle.
    plan = plan_of(array(32, 64, 32, 256, 64, 32, 32), two_groups, world_size=2, seed=3)
    assert plan.pack_first_rank.tolist() == [0, 1, 0, 0, 1]
    assert plan.pack_group.tolist() == [0, 0, 1, 0, 0]
    assert plan.pack_step.tolist() == [0, 0, 1, 2, 2]
    assert plan.pack_micro_step.tolist() == [0] * 5
    packs = np.split(plan.sample_ids, plan.pack_offsets[1:-1])
    steps = [sorted(np.concatenate(packs[i:j]).tolist()) for i, j in ((0, 2), (2, 3), (3, 5))]
    assert steps[1] == [3]
    assert sorted([steps[0], steps[2]]) == [[0, 2, 5, 6], [1, 4]]


def test_room_goes_to_the_next_shorter_group_first() -> None:
    groups = tuple(PackingGroup(name=name, pack_len=n) for name, n in (("a", 8), ("b", 16), ("c", 64)))
    # 48 leaves 16 in c: b's 12 comes before a's 8, then 4 of a fits beside it.
    plan = plan_of(array(8, 4, 12, 48), groups, world_size=1)
    assert sorted(plan.sample_ids[plan.pack_group[plan.pack_of_sample] == 2].tolist()) == [1, 2, 3]
    assert sorted(plan.sample_ids[plan.pack_group[plan.pack_of_sample] == 0].tolist()) == [0]
    assert not (plan.pack_group == 1).any(), "a group whose samples were all taken has no step"
    unfilled = plan_of(array(8, 4, 12, 48), groups, world_size=1, planner=BalancePlanner(fill=False))
    assert sorted(unfilled.pack_group.tolist()) == [0, 0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("seed", range(20))
def test_laws_hold_for_any_groups(world_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pack_lens = np.unique(rng.integers(1, 30, rng.integers(1, 5))) * 2 * world_size
    degrees = [n for n in (1, 2, 4, 8) if world_size % n == 0]
    groups = tuple(PackingGroup(name=str(n), pack_len=int(n), cp_degree=int(rng.choice(degrees))) for n in pack_lens)
    lengths = rng.integers(1, rng.choice([2, 10, pack_lens[-1] + 1, pack_lens[-1] + 5]), rng.integers(1, 80)).astype(np.int32)
    lengths[0] = pack_lens[-1] if seed % 2 else 1
    fitting = np.flatnonzero(lengths <= pack_lens[-1]).tolist()
    for overlong in ("drop", "truncate"):
        plan = plan_of(lengths, groups, planner=BalancePlanner(overlong=overlong), world_size=world_size, seed=seed)
        placed = fitting if overlong == "drop" else list(range(len(lengths)))
        assert_lawful(plan, lengths, placed)
        assert plan.lengths.sum() == np.minimum(lengths, pack_lens[-1])[placed].sum(), "tokens are conserved"
        assert (pack_lens[plan.pack_group[plan.pack_of_sample]] >= plan.lengths).all(), "no sample in too short a group"


def test_one_sample_leaves_the_other_ranks_an_empty_pack() -> None:
    plan = plan_of(array(5), (PackingGroup(name="all", pack_len=8),), world_size=8)
    assert sorted(np.diff(plan.pack_offsets).tolist()) == [0] * 7 + [1]
    assert [len(list(plan.for_rank(rank))) for rank in range(8)] == [1] * 8


def test_every_rank_shares_a_pack_where_the_degree_is_the_world_size() -> None:
    plan = plan_of(array(16, 16, 7), (PackingGroup(name="all", pack_len=16, cp_degree=8),), world_size=8)
    for rank in range(8):
        assert [(pack.index, pack.cp_rank) for pack in plan.for_rank(rank)] == [(0, rank), (1, rank), (2, rank)]


def test_a_micro_step_up_to_a_tenth_over_the_target_is_silent(two_groups: Groups) -> None:
    assert BalancePlanner(tokens_per_step=466).accumulation(two_groups[1], 4) == 1  # 512 is 9.9% more
    with pytest.warns(UserWarning, match=r"tokens_per_step=465; its optimizer steps are larger than asked"):
        assert BalancePlanner(tokens_per_step=465).accumulation(two_groups[1], 4) == 1
    assert BalancePlanner(tokens_per_step=767).accumulation(two_groups[1], 4) == 1
    assert BalancePlanner(tokens_per_step=768).accumulation(two_groups[1], 4) == 2


def test_a_group_without_samples_warns_of_nothing(two_groups: Groups) -> None:
    plan = plan_of(array(64, 64), two_groups, planner=BalancePlanner(tokens_per_step=128), world_size=2)
    assert plan.pack_group.tolist() == [0, 0], "long packs would hold 256 tokens"


def test_the_comparison_plans_as_the_run_does(two_groups: Groups, draw_lengths: Callable[[int], Lengths]) -> None:
    lengths = draw_lengths(2)
    compared = compare_with_naive(BalancePlanner(), lengths, two_groups, world_size=4, seed=7)
    assert compared["HBP"].hash == plan_of(lengths, two_groups, seed=7).hash
    assert compared["one length"].groups == two_groups[-1:]
    assert_lawful(compared["one length"], lengths, list(range(len(lengths))))


def test_a_cut_sample_is_the_whole_of_its_pack(two_groups: Groups) -> None:
    plan = plan_of(array(300, 400), two_groups, planner=BalancePlanner(overlong="truncate"), world_size=2)
    assert plan.lengths.tolist() == [256, 256]
    assert plan.num_steps == 2

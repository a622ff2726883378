import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.comparison.baselines import BASELINES
from hbp_tune.planning.comparison.methods import BASELINE_NAMES, one_length_group, plan_baseline, plan_comparison
from hbp_tune.planning.comparison.metrics import measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from tests.planning.helpers import array, assert_lawful, chat_lengths, cost_doubling_at, rows_of

Draw = Callable[[int], NDArray[np.int32]]
ALL = PackingGroup(name="all", pack_len=256, cp_degree=2)


def test_every_baseline_has_a_name() -> None:
    assert list(BASELINE_NAMES) == [*BASELINES, "longalign_sorted"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_baselines_place_every_sample(name: str, seed: int, draw_lengths: Draw) -> None:
    lengths = draw_lengths(seed)
    plan = plan_baseline(name, lengths, ALL, world_size=8, seed=seed, tokens_per_step=[None, 5000][seed % 2])
    assert_lawful(plan, lengths)
    assert plan.groups == (ALL,)
    assert plan.hash == plan_baseline(name, lengths, ALL, world_size=8, seed=seed, tokens_per_step=[None, 5000][seed % 2]).hash


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_baselines_treat_the_overlong_as_the_run_does(name: str) -> None:
    lengths = array(300, 10, 256, 12)
    with pytest.raises(PackingError, match=r"sample 0 has 300 tokens, group 'all' holds 256"):
        plan_baseline(name, lengths, ALL, world_size=2, seed=0)
    assert_lawful(plan_baseline(name, lengths, ALL, world_size=2, seed=0, overlong="drop"), lengths, [1, 2, 3])
    assert_lawful(plan_baseline(name, lengths, ALL, world_size=2, seed=0, overlong="truncate"), lengths)


@pytest.mark.parametrize("name", sorted(set(BASELINE_NAMES) - {"longalign_sorted"}))
def test_packs_are_the_packers_and_their_order_is_random(name: str) -> None:
    lengths = np.random.default_rng(0).integers(20, 257, 400).astype(np.int32)
    place = BASELINES[name]().place(lengths, 256, seed=3, epoch=0)
    plan = plan_baseline(name, lengths, ALL, world_size=2, seed=3)
    packs = [np.flatnonzero(place == pack).tolist() for pack in range(place.max() + 1)]
    assert sorted(sorted(row) for row in rows_of(plan)) == sorted(packs)
    work = plan.sum_per_pack(plan.lengths.astype(np.int64) ** 2)
    assert abs(np.corrcoef(work[1:], work[:-1])[0, 1]) < 0.3


@pytest.mark.parametrize("seed", range(20))
def test_sorted_batches_are_neighbours_in_length(seed: int, draw_lengths: Draw) -> None:
    plan = plan_baseline("longalign_sorted", draw_lengths(seed), ALL, world_size=8, seed=seed)
    assert np.diff(plan.pack_offsets).max() == 1, "no packing"
    steps = [plan.lengths[plan.pack_step[plan.pack_of_sample] == step] for step in range(plan.num_steps)]
    steps.sort(key=lambda lengths: (lengths.min(), lengths.max()))
    assert all(shorter.max() <= longer.min() for shorter, longer in itertools.pairwise(steps))


def test_sorted_batches_come_in_random_order() -> None:
    plan = plan_baseline("longalign_sorted", np.arange(1, 201, dtype=np.int32), ALL, world_size=8, seed=0)
    first_of_step = plan.lengths[:: ALL.cp_degree * 2]
    assert 0.3 < np.mean(np.diff(first_of_step) > 0) < 0.7


def test_an_unknown_baseline() -> None:
    with pytest.raises(ConfigError, match=r"baseline 'sorted' is unknown; choose from none, random, .*, longalign_sorted$"):
        plan_baseline("sorted", array(5), ALL, world_size=2, seed=0)


def test_baselines_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_baseline("isf", array(5, 200), ALL, world_size=2, seed=0, tokens_per_step=1)


def test_balance_is_what_sets_plans_apart() -> None:
    lengths, group, cost = (
        chat_lengths(5000, 16_384, sigma=1.3),
        PackingGroup(name="all", pack_len=16_384),
        cost_doubling_at(4000),
    )
    by_name = {name: measure(plan_baseline(name, lengths, group, world_size=8, seed=0), cost) for name in BASELINE_NAMES}
    planned = BalancePlanner().plan(lengths, lengths, [group], world_size=8, seed=0, cost=cost)
    assert measure(planned, cost).idle < 0.3 * min(
        metrics.idle for name, metrics in by_name.items() if name != "longalign_sorted"
    )
    assert by_name["none"].dbr > by_name["longalign_sorted"].dbr
    assert by_name["none"].ave_t < by_name["isf"].ave_t


def test_one_length_is_the_shortest_that_holds_every_sample() -> None:
    groups = [PackingGroup(name=name, pack_len=n) for name, n in (("a", 8), ("b", 16), ("c", 64))]
    names = {longest: one_length_group(groups, array(3, longest, 2)).name for longest in (3, 8, 9, 16, 17, 64, 100)}
    assert names == {3: "a", 8: "a", 9: "b", 16: "b", 17: "c", 64: "c", 100: "c"}


@pytest.mark.parametrize("mode", ["cost", "paper"])
def test_the_comparison_plans_as_the_run_does(two_groups: tuple[PackingGroup, ...], draw_lengths: Draw, mode: str) -> None:
    lengths, planner, cost = draw_lengths(2), BalancePlanner(tokens_per_step=2000, mode=mode), cost_doubling_at(30)
    plan = planner.plan(lengths, lengths, two_groups, world_size=4, seed=7, cost=cost)
    compared = plan_comparison(plan, planner, seed=7, cost=cost)
    assert list(compared) == ["HBP", "one length"]
    assert compared["HBP"] is plan
    assert compared["one length"].groups == two_groups[-1:]
    want = plan_baseline("isf", lengths, two_groups[1], world_size=4, seed=7, tokens_per_step=2000)
    assert compared["one length"].hash == want.hash


def test_the_comparison_is_on_more_ranks_where_one_pack_takes_all(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Draw
) -> None:
    lengths, planner, cost = draw_lengths(1), BalancePlanner(), cost_doubling_at(30)
    plan = planner.plan(lengths, lengths, two_groups, world_size=2, seed=0, cost=cost)
    compared = plan_comparison(plan, planner, seed=0, cost=cost)
    assert [each.world_size for each in compared.values()] == [8, 8]
    for each in compared.values():
        assert_lawful(each, lengths)
    assert compared["HBP"].hash == planner.plan(lengths, lengths, two_groups, world_size=8, seed=0, cost=cost).hash


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_comparison_is_of_the_same_samples(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Draw, world_size: int, overlong: str
) -> None:
    lengths, planner = np.append(draw_lengths(1), array(500, 600)), BalancePlanner(overlong=overlong)
    plan = planner.plan(lengths, lengths, two_groups, world_size=world_size, seed=0)
    # A saved plan may have been made under another policy than the run's.
    for each in plan_comparison(plan, BalancePlanner(), seed=0, cost=CostModel()).values():
        assert np.array_equal(np.sort(each.lengths), np.sort(plan.lengths))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_comparison_repeats_what_is_drawn_twice(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Draw, world_size: int
) -> None:
    lengths, planner, cost = draw_lengths(1), BalancePlanner(), cost_doubling_at(30)
    drawn = np.random.default_rng(0).choice(len(lengths), len(lengths) + 50).astype(np.int32)
    plan = planner.plan(lengths, lengths, two_groups, world_size=world_size, seed=0, cost=cost, sample_ids=drawn)
    for each in plan_comparison(plan, planner, seed=0, cost=cost).values():
        assert sorted(each.lengths.tolist()) == sorted(lengths[drawn].tolist())


def test_the_comparison_is_silent(two_groups: tuple[PackingGroup, ...], draw_lengths: Draw) -> None:
    lengths, planner = draw_lengths(3), BalancePlanner(tokens_per_step=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = planner.plan(lengths, lengths, two_groups, world_size=2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_comparison(plan, planner, seed=0, cost=CostModel())

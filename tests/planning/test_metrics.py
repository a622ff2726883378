from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.comparison.metrics import (
    StepMetrics,
    diversity_by_group,
    measure,
    measure_steps,
    micro_step_s,
    padded_lens,
)
from hbp_tune.planning.costs.cost import LLAMA3_1_8B, CostModel
from hbp_tune.planning.costs.hardware import H100
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.planning.plans.sharding import padded_len
from tests.planning.helpers import array, chat_lengths, cost_doubling_at

Lengths = NDArray[np.int32]
Classes = NDArray[np.int16]


def plan_of(
    lengths: Lengths,
    groups: Sequence[PackingGroup],
    *,
    world_size: int,
    mode: str = "paper",
    seed: int = 0,
    cost: CostModel | None = None,
    **arguments: object,
) -> EpochPlan:
    planner = BalancePlanner(mode=mode, **arguments)
    return planner.plan(lengths, lengths, groups, world_size=world_size, seed=seed, cost=cost)


def by_definition(plan: EpochPlan, cost: CostModel) -> dict[str, float]:
    """Compute the metrics in plain loops from their definitions."""
    dbr, abr, cbr, padding, slots, tail, communicating, tokens = [], [], [], 0, 0, 0, 0, 0
    mean_time, most_time, seconds = [], [], []  # by step, by step, by micro-step
    for step in range(plan.num_steps):
        mine = [i for i in range(plan.num_packs) if plan.pack_step[i] == step]
        mean_time.append(0.0)
        most_time.append(0.0)
        for micro_step in range(max(int(plan.pack_micro_step[i]) for i in mine) + 1):
            t, a, c, s = [], [], [], [cost.gather_s(plan.world_size)]
            for i in mine:
                if plan.pack_micro_step[i] != micro_step:
                    continue
                group = plan.groups[plan.pack_group[i]]
                lengths = [int(n) for n in plan.lengths[plan.pack_offsets[i] : plan.pack_offsets[i + 1]]]
                padded = padded_len(sum(lengths), group.cp_degree, group.pack_len)
                t.append(sum(lengths))
                a.append(sum(n * n for n in lengths))
                c.append(sum(n * (n + cost.double_len) for n in lengths))
                shape = [np.array([value]) for value in (t[-1], a[-1], group.cp_degree, group.ac_layers)]
                worked_s = float(cost.pack_seconds(*shape, keeps_attention=group.ac_mode == "selective").total[0])
                s.append(worked_s + cost.micro_step_s)
                tokens += sum(lengths)
                if lengths:
                    padding, slots = padding + padded - sum(lengths), slots + padded
                else:
                    tail += padded
                communicating += sum(lengths) if group.cp_degree > 1 else 0
            dbr.append(sum(max(t) - x for x in t) / (max(t) * len(t)))
            abr.append(sum(max(a) - x for x in a) / (max(a) * len(a)))
            cbr.append(sum(max(c) - x for x in c) / (max(c) * len(c)))
            mean_time[-1] += sum(c) / len(c) / group.cp_degree
            most_time[-1] += max(c) / group.cp_degree
            seconds.append(max(s))
    return {
        "dbr": float(np.mean(dbr)),
        "pr": padding / slots,
        "pr_tail": tail / (slots + tail),
        "abr": float(np.mean(abr)),
        "cr": communicating / tokens,
        "ave_t": tokens / (len(seconds) * plan.world_size),
        "cbr": float(np.mean(cbr)),
        "idle": 1 - sum(mean_time) / sum(most_time),
        "p99_imbalance": float(np.quantile([1 - mean / most for mean, most in zip(mean_time, most_time, strict=True)], 0.99)),
        "epoch_s": sum(seconds),
    }


@pytest.mark.parametrize("mode", ["cost", "paper"])
@pytest.mark.parametrize("seed", range(10))
def test_metrics_equal_their_definitions(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Callable[[int], Lengths], seed: int, mode: str
) -> None:
    cost = [CostModel(), cost_doubling_at(30)][seed % 2]
    plan = plan_of(draw_lengths(seed), two_groups, world_size=4, mode=mode, seed=seed, cost=cost, tokens_per_step=1000)
    got = measure(plan, cost)
    for name, want in by_definition(plan, cost).items():
        assert getattr(got, name) == pytest.approx(want), name


def test_balancing_balances() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1.5, 4000), 1, 8192).astype(np.int32)
    groups = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=8192, cp_degree=2))
    cost = cost_doubling_at(1000)
    by = {
        sort_by: measure(plan_of(lengths, groups, world_size=8, sort_by=sort_by, cost=cost), cost)
        for sort_by in ("attention", "cost", "tokens", None)
    }
    assert by["attention"].abr < 0.1 * by[None].abr
    assert by["cost"].cbr < 0.1 * by[None].cbr
    assert by["cost"].cbr < by["attention"].cbr
    assert by["tokens"].dbr < by["attention"].dbr
    assert by["attention"].cr == by[None].cr < 1.0
    assert by["attention"].epoch_s < by[None].epoch_s


def test_metrics_by_hand() -> None:
    # Packs of one rank each, nothing padded: tokens 256 | 128, attention 2 * 128**2 | 128**2 in the only micro-step.
    groups = (
        PackingGroup(name="short", pack_len=256, ac_layers=8, ac_mode="selective"),
        PackingGroup(name="long", pack_len=512, cp_degree=2, ac_layers=8),
    )
    cost = cost_doubling_at(100)
    got = measure(plan_of(array(128, 128, 128), groups, world_size=2), cost)
    assert (got.dbr, got.pr, got.pr_tail, got.abr, got.cr, got.ave_t) == (0.25, 0, 0, 0.25, 0, 192)
    assert (got.cbr, got.idle, got.p99_imbalance, got.diversity) == (0.25, 0.25, 0.25, 1)

    # One sample for two replicas: 256 tokens beside an empty pack of 128; then 400 in 512 on both ranks.
    got = measure(plan_of(array(256, 400), groups, world_size=2, fill=False), cost)
    assert got.dbr == pytest.approx((0.5 + 0) / 2)
    assert got.pr == pytest.approx(112 / (256 + 512))
    assert got.pr_tail == pytest.approx(128 / (256 + 128 + 512))
    assert got.abr == pytest.approx((0.5 + 0) / 2)
    assert got.cr == pytest.approx(400 / 656)
    assert got.ave_t == pytest.approx(656 / (2 * 2))
    # The long pack costs its two ranks 400 * 500 / 2 each, the short one 256 * 356 one of them, and the other waits.
    assert got.cbr == pytest.approx((0.5 + 0) / 2)
    assert got.idle == pytest.approx(0.5 * 256 * 356 / (256 * 356 + 400 * 500 / 2))
    assert got.p99_imbalance == pytest.approx(0.99 * 0.5)


def test_equal_packs_are_perfect() -> None:
    groups = (PackingGroup(name="all", pack_len=1024),)
    got = measure(plan_of(np.full(24, 256, dtype=np.int32), groups, world_size=2), CostModel())
    assert (got.dbr, got.pr, got.pr_tail, got.abr, got.cr, got.ave_t) == (0, 0, 0, 0, 0, 1024)
    assert (got.cbr, got.idle, got.p99_imbalance, got.diversity) == (0, 0, 0, 1)


def test_padded_lengths_by_hand() -> None:
    groups = (PackingGroup(name="short", pack_len=256), PackingGroup(name="long", pack_len=1024, cp_degree=2))
    plan = plan_of(array(100, 700), groups, world_size=2, fill=False)
    by_group = {name: padded_lens(plan)[plan.pack_group == index].tolist() for index, name in enumerate(("short", "long"))}
    assert {name: sorted(slots) for name, slots in by_group.items()} == {"short": [128, 128], "long": [768]}


def test_a_micro_step_lasts_as_long_as_its_slowest_rank_or_the_weights() -> None:
    # Half of a layer's forward again: a sixth of the linear work, a seventh of attention's.
    groups = (PackingGroup(name="all", pack_len=65_536, ac_layers=16),)
    cost = CostModel(replace(LLAMA3_1_8B, head_params=0), replace(H100, micro_step_tokens=100))
    fixed_s = 100 * cost.token_s
    seconds = micro_step_s(plan_of(array(60_000, 50_000, 10, 10), groups, world_size=2), cost)
    long_s = 7 / 6 * 60_000 * cost.token_s + 8 / 7 * 60_000**2 * cost.square_s
    assert sorted(seconds.tolist()) == pytest.approx([long_s + fixed_s])
    keeping = tuple(replace(group, ac_mode="selective") for group in groups)
    seconds = micro_step_s(plan_of(array(60_000, 50_000, 10, 10), keeping, world_size=2), cost)
    kept_s = 7 / 6 * 60_000 * cost.token_s + 60_000**2 * cost.square_s
    assert seconds.tolist() == pytest.approx([kept_s + fixed_s])
    seconds = micro_step_s(plan_of(array(10, 10), groups, world_size=2), cost)
    assert seconds.tolist() == [cost.gather_s(2)]


def cut_evenly(order: NDArray[np.int64], lengths: Lengths, num_steps: int) -> EpochPlan:
    """Plan one pack a step, for one rank: samples in this order, cut at equal tokens."""
    cuts = np.searchsorted(np.cumsum(lengths[order]), lengths.sum() * np.arange(1, num_steps) / num_steps)
    no_ids = array()
    return EpochPlan(
        groups=(PackingGroup(name="all", pack_len=2**20),),
        world_size=1,
        sample_ids=order.astype(np.int32),
        lengths=lengths[order],
        pack_offsets=np.concatenate(([0], cuts, [len(order)])),
        pack_group=np.zeros(num_steps, dtype=np.int16),
        pack_step=np.arange(num_steps, dtype=np.int32),
        pack_micro_step=np.zeros(num_steps, dtype=np.int16),
        pack_first_rank=np.zeros(num_steps, dtype=np.int32),
        dropped=no_ids,
        truncated=no_ids,
    )


LENGTHS = chat_lengths(5000, 8192)
_UNIFORM = np.random.default_rng(1).random(5000)
CLASSES = {
    "length": None,
    "source": np.searchsorted([0.7, 0.95], _UNIFORM).astype(np.int16),
    "long source": (_UNIFORM < LENGTHS / 3000).astype(np.int16),
}


@pytest.mark.parametrize("name", CLASSES)
def test_random_steps_are_as_diverse_as_predicted(name: str) -> None:
    drawn = [
        diversity_by_group(cut_evenly(np.random.default_rng(seed).permutation(5000), LENGTHS, 50), CLASSES[name])[0]
        for seed in range(20)
    ]
    assert np.mean(drawn) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_sorted_steps_are_far_from_diverse(name: str) -> None:
    key = LENGTHS if CLASSES[name] is None else CLASSES[name]
    assert diversity_by_group(cut_evenly(np.argsort(key, kind="stable"), LENGTHS, 50), CLASSES[name])[0] > 20


def test_cost_mode_is_as_diverse_as_random_steps_and_paper_mode_is_not() -> None:
    groups = [PackingGroup(name="all", pack_len=8192)]
    plans = {
        mode: [plan_of(LENGTHS, groups, world_size=8, mode=mode, seed=seed) for seed in range(8)] for mode in ("cost", "paper")
    }
    assert plans["cost"][0].num_steps > 40

    def diversity(mode: str, name: str) -> float:
        return float(np.mean([diversity_by_group(plan, CLASSES[name])[0] for plan in plans[mode]]))

    assert diversity("cost", "source") == pytest.approx(1, abs=0.2)
    assert diversity("cost", "length") < 0.6, "each pack gets its share of long samples"
    assert diversity("cost", "long source") < 1.1
    assert diversity("paper", "length") > 5
    assert diversity("paper", "long source") > 4


def diversity_by_definition(plan: EpochPlan, classes: Classes) -> list[float]:
    """Say plainly what is divided by what."""
    steps: dict[int, dict[int, list[tuple[int, int]]]] = {}  # group, step: (class, length)
    for pack in range(plan.num_packs):
        for i in range(int(plan.pack_offsets[pack]), int(plan.pack_offsets[pack + 1])):
            entries = steps.setdefault(int(plan.pack_group[pack]), {}).setdefault(int(plan.pack_step[pack]), [])
            entries.append((int(classes[plan.sample_ids[i]]), int(plan.lengths[i])))
    result = []
    for index in range(len(plan.groups)):
        mine = steps.get(index, {})
        samples = [sample for step in mine.values() for sample in step]
        tokens = sum(length for _, length in samples)
        names = sorted({name for name, _ in samples})
        share = {name: sum(length for other, length in samples if other == name) / tokens for name in names}
        squares = sum(p**2 for p in share.values())
        expected = (
            (len(mine) - 1) * sum(length**2 * (1 - 2 * share[name] + squares) for name, length in samples) / tokens**2
            if mine
            else 0
        )
        shares = [
            [sum(length for other, length in step if other == name) / sum(length for _, length in step) for name in names]
            for step in mine.values()
        ]
        result.append(float(np.var(shares, axis=0).sum()) / expected if expected else 1.0)
    return result


@pytest.mark.parametrize("seed", range(10))
def test_diversity_equals_its_definition(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Callable[[int], Lengths], seed: int
) -> None:
    lengths = draw_lengths(seed)
    classes = np.random.default_rng(seed).integers(0, 4, len(lengths)).astype(np.int16)
    plan = plan_of(lengths, two_groups, world_size=4, seed=seed)
    assert diversity_by_group(plan, classes).tolist() == pytest.approx(diversity_by_definition(plan, classes))
    group = np.argmax([np.count_nonzero(plan.pack_group[plan.pack_of_sample] == index) for index in range(2)])
    assert measure(plan, CostModel(), classes).diversity == pytest.approx(diversity_by_definition(plan, classes)[group])


def test_one_step_or_one_class_is_as_diverse_as_can_be(two_groups: tuple[PackingGroup, ...]) -> None:
    assert diversity_by_group(plan_of(array(5, 6, 7), two_groups, world_size=2)).tolist() == [1, 1]
    plan = plan_of(np.arange(1, 65, dtype=np.int32), two_groups, world_size=2)
    assert diversity_by_group(plan, np.full(64, 3, dtype=np.int16)).tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["cost", "paper"])
def test_a_step_has_the_figures_of_its_packs_as_a_plan_of_their_own(mode: str) -> None:
    groups = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=8192, cp_degree=2, ac_layers=8))
    for seed in range(5):
        cost = cost_doubling_at(300)
        plan = plan_of(chat_lengths(400, 8192, seed, sigma=1.6), groups, world_size=8, mode=mode, tokens_per_step=70_000)
        steps = measure_steps(plan, cost)
        assert len(steps) == plan.num_steps
        assert steps.tokens.tolist() == plan.step_tokens.tolist()
        for step in range(plan.num_steps):
            alone = measure(only_step(plan, step), cost)
            got = {name: getattr(steps, name)[step] for name in ("dbr", "pr", "abr", "cr")}
            assert got == pytest.approx({name: getattr(alone, name) for name in got}, abs=1e-12)
            assert steps.modelled_s[step] == pytest.approx(alone.epoch_s)
            mine = plan.lengths[plan.pack_step[plan.pack_of_sample] == step].astype(np.int64)
            assert steps.squares[step] == (mine**2).sum()
            assert groups[steps.group[step]].cp_degree == only_step(plan, step).cp_degrees[0]


def only_step(plan: EpochPlan, step: int) -> EpochPlan:
    """Give a plan of the packs of one step."""
    packs = np.flatnonzero(plan.pack_step == step)
    samples = slice(int(plan.pack_offsets[packs[0]]), int(plan.pack_offsets[packs[-1] + 1]))
    fields = ("pack_group", "pack_step", "pack_micro_step", "pack_first_rank")
    return replace(
        plan,
        sample_ids=plan.sample_ids[samples],
        lengths=plan.lengths[samples],
        pack_offsets=plan.pack_offsets[packs[0] : packs[-1] + 2] - plan.pack_offsets[packs[0]],
        **{name: getattr(plan, name)[packs] for name in fields} | {"pack_step": np.zeros(len(packs), dtype=np.int32)},
    )


def test_the_steps_of_a_run_are_those_of_its_epochs_up_to_its_end() -> None:
    groups = (PackingGroup(name="all", pack_len=1024),)
    cost = CostModel()
    epochs = [measure_steps(plan_of(chat_lengths(50, 1024), groups, world_size=2, seed=seed), cost) for seed in (0, 1)]
    run = StepMetrics.joined(epochs, [len(epochs[0]), 2])
    assert len(run) == len(epochs[0]) + 2
    assert run.tokens.tolist() == [*epochs[0].tokens.tolist(), *epochs[1].tokens[:2].tolist()]

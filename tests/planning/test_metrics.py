from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.components.planning.metrics import PlanMetrics, measure
from hbp_tune.components.planning.planner import BalancePlanner
from hbp_tune.components.planning.records import EpochPlan, PackingGroup
from hbp_tune.components.planning.sharding import local_rows, padded_len


def by_definition(plan: EpochPlan) -> dict[str, float]:
    """Compute the metrics in plain loops from the paper's definitions."""
    dbr, abr, padding, slots, tail, communicating, tokens, micro_steps = [], [], 0, 0, 0, 0, 0, 0
    for step in range(plan.num_steps):
        mine = [i for i in range(plan.num_packs) if plan.pack_step[i] == step]
        for micro_step in range(max(int(plan.pack_micro_step[i]) for i in mine) + 1):
            micro_steps += 1
            t, a = [], []
            for i in mine:
                if plan.pack_micro_step[i] != micro_step:
                    continue
                group = plan.groups[plan.pack_group[i]]
                lengths = [int(n) for n in plan.lengths[plan.pack_offsets[i] : plan.pack_offsets[i + 1]]]
                padded = padded_len(sum(lengths), group.cp_degree, group.pack_len)
                t.append(padded)
                a.append(sum(n * n for n in lengths))
                tokens += sum(lengths)
                if lengths:
                    padding, slots = padding + padded - sum(lengths), slots + padded
                else:
                    tail += padded
                communicating += sum(lengths) if group.cp_degree > 1 else 0
            dbr.append(sum(max(t) - x for x in t) / (max(t) * len(t)))
            abr.append(sum(max(a) - x for x in a) / (max(a) * len(a)))
    return {
        "dbr": float(np.mean(dbr)),
        "pr": padding / slots,
        "pr_tail": tail / (slots + tail),
        "abr": float(np.mean(abr)),
        "cr": communicating / tokens,
        "ave_t": tokens / (micro_steps * plan.world_size),
    }


@pytest.mark.parametrize("seed", range(10))
def test_metrics_equal_their_definitions(
    two_groups: tuple[PackingGroup, ...], draw_lengths: Callable[[int], NDArray[np.int32]], seed: int
) -> None:
    lengths = draw_lengths(seed)
    plan = BalancePlanner(tokens_per_step=1000).plan(lengths, lengths, two_groups, world_size=4, seed=seed)
    got = measure(plan)
    for name, want in by_definition(plan).items():
        assert getattr(got, name) == pytest.approx(want), name


def test_balancing_balances() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1.5, 4000), 1, 8192).astype(np.int32)
    groups = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=8192, cp_degree=2))
    balanced, unbalanced = (
        measure(BalancePlanner(balance=balance).plan(lengths, lengths, groups, world_size=8, seed=0)) for balance in (True, False)
    )
    assert balanced.abr < 0.1 * unbalanced.abr
    assert balanced.cr == unbalanced.cr < 1.0


def test_padding_by_hand() -> None:
    assert [padded_len(n, 1, 1024) for n in (0, 1, 128, 129, 1000, 1024)] == [128, 128, 128, 256, 1024, 1024]
    assert padded_len(1, 96, 19200) == 384  # lcm(2 * 96, 128)
    assert padded_len(33, 1, 48) == 48, "never more than the pack's length"


@pytest.mark.parametrize("cp_degree", [1, 2, 3, 4, 8])
def test_ranks_share_out_all_rows_evenly(cp_degree: int) -> None:
    padded = padded_len(1000, cp_degree, 48 * 1024)
    rows = [list(range(padded))[local_rows(padded, rank, cp_degree)] for rank in range(cp_degree)]
    assert [row for part in rows for row in part] == list(range(padded))
    assert len({len(part) for part in rows}) == 1


def test_metrics_by_hand() -> None:
    # Packs of one rank each, nothing padded: tokens 256 | 128, attention 2 * 128**2 | 128**2 in the only micro-step.
    groups = (PackingGroup(name="short", pack_len=256), PackingGroup(name="long", pack_len=512, cp_degree=2))
    lengths = np.array([128, 128, 128], dtype=np.int32)
    got = measure(BalancePlanner().plan(lengths, lengths, groups, world_size=2, seed=0))
    assert got == PlanMetrics(dbr=0.25, pr=0.0, pr_tail=0.0, abr=0.25, cr=0.0, ave_t=192.0)

    # One sample for two replicas: 100 tokens in 128 slots beside an empty pack of 128; then 400 in 512 on both ranks.
    lengths = np.array([256, 400], dtype=np.int32)
    got = measure(BalancePlanner(fill=False).plan(lengths, lengths, groups, world_size=2, seed=0))
    assert got.dbr == pytest.approx((0.25 + 0) / 2)
    assert got.pr == pytest.approx(112 / (256 + 512))
    assert got.pr_tail == pytest.approx(128 / (256 + 128 + 512))
    assert got.abr == pytest.approx((0.5 + 0) / 2)
    assert got.cr == pytest.approx(400 / 656)
    assert got.ave_t == pytest.approx(656 / (2 * 2))


def test_equal_packs_are_perfect() -> None:
    lengths = np.full(24, 256, dtype=np.int32)
    groups = (PackingGroup(name="all", pack_len=1024),)
    got = measure(BalancePlanner().plan(lengths, lengths, groups, world_size=2, seed=0))
    assert got == PlanMetrics(dbr=0.0, pr=0.0, pr_tail=0.0, abr=0.0, cr=0.0, ave_t=1024.0)

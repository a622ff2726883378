from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.comparison.metrics import measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.report import PlanReport

GROUPS = (
    PackingGroup(name="short", pack_len=64),
    PackingGroup(name="long", pack_len=256, cp_degree=2, ac_layers=3),
    PackingGroup(name="longest", pack_len=1024, cp_degree=4, ac_layers=4),
)


def assemble(groups: tuple[PackingGroup, ...], world_size: int, steps: list[tuple[int, list[list[list[int]]]]]) -> EpochPlan:
    """Make a plan by hand: steps of (group, micro-steps of packs of lengths); ids count up in training order."""
    packs, rows = [], []
    for step, (group, micro_steps) in enumerate(steps):
        for micro_step, replicas in enumerate(micro_steps):
            packs += replicas
            rows += [(group, step, micro_step, i * groups[group].cp_degree) for i in range(len(replicas))]
    lengths = np.array([length for pack in packs for length in pack], dtype=np.int32)
    pack_group, step_of, micro_step_of, first_rank = np.array(rows).T
    return EpochPlan(
        groups=groups,
        world_size=world_size,
        sample_ids=np.arange(len(lengths), dtype=np.int32),
        lengths=lengths,
        pack_offsets=np.cumsum([0, *map(len, packs)]),
        pack_group=pack_group.astype(np.int16),
        pack_step=step_of.astype(np.int32),
        pack_micro_step=micro_step_of.astype(np.int16),
        pack_first_rank=first_rank.astype(np.int32),
        dropped=np.array([], dtype=np.int32),
        truncated=np.array([], dtype=np.int32),
    )


@pytest.fixture
def by_hand() -> EpochPlan:
    """Two ranks: a short step of two micro-steps, whose last pack is empty, and a long step on both ranks."""
    return assemble(GROUPS[:2], 2, [(0, [[[60], [30, 20]], [[40], []]]), (1, [[[250]]])])


@pytest.fixture
def draw_plan() -> Callable[[int], EpochPlan]:
    """Draw a plan by a seed: any order of groups, one to three micro-steps a step, a third of the packs empty."""

    def draw(seed: int) -> EpochPlan:
        rng = np.random.default_rng(seed)
        groups = GROUPS[: rng.integers(1, 4)]
        world_size = int(rng.choice([4, 8]))

        def pack(pack_len: int) -> list[int]:
            return rng.integers(1, pack_len // 4, rng.integers(1, 5)).tolist() if rng.random() < 0.7 else []

        def micro_step(group: PackingGroup) -> list[list[int]]:
            replicas = [pack(group.pack_len) for _ in range(world_size // group.cp_degree)]
            if not any(replicas):
                replicas[-1] = [group.pack_len]
            return replicas

        order = rng.integers(0, len(groups), rng.integers(1, 30))
        steps = [(int(index), [micro_step(groups[index]) for _ in range(rng.integers(1, 4))]) for index in order]
        plan = assemble(groups, world_size, steps)
        plan.sample_ids[:] = rng.permutation(len(plan.sample_ids))
        return plan

    return draw


@pytest.fixture
def report_on() -> Callable[..., PlanReport]:
    """Report on plans, the first of which also stands in for naive packing."""

    def report(*plans: EpochPlan, lengths: NDArray[np.int32] | None = None, **changes: object) -> PlanReport:
        cost = CostModel()
        metrics = measure(plans[0], cost)
        values = {
            "lengths": plans[0].lengths if lengths is None else lengths,
            "lengths_from": "made up",
            "plans": plans,
            "naive": plans[0],
            "cost": cost,
            "metrics": metrics,
            "baselines": {"isf": metrics},
            "headline": "This plan is 1.50x as fast.",
            "seconds": {"plan": 0.25},
        }
        return PlanReport(**(values | changes))  # type: ignore[arg-type]

    return report

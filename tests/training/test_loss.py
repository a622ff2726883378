from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning import BalancePlanner, EpochPlan, PackingGroup
from hbp_tune.training import AveTokenLoss, LongAlignLoss, SampleMeanLoss, SumLoss, TokenMeanLoss

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2))
LOSSES = (AveTokenLoss, TokenMeanLoss, SampleMeanLoss, SumLoss, LongAlignLoss)


@pytest.fixture
def plan() -> EpochPlan:
    """Two ranks. Step 0: packs (0, 1), (2,), then (3,), empty. Step 1: packs (4,) and (5,). Step 2: 6 on both ranks."""
    return EpochPlan(
        groups=GROUPS,
        world_size=2,
        sample_ids=np.arange(7, dtype=np.int32),
        lengths=np.array([20, 30, 40, 60, 50, 50, 200], dtype=np.int32),
        pack_offsets=np.array([0, 2, 3, 4, 4, 5, 6, 7]),
        pack_group=np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.int16),
        pack_step=np.array([0, 0, 0, 0, 1, 1, 2], dtype=np.int32),
        pack_micro_step=np.array([0, 0, 1, 1, 0, 0, 0], dtype=np.int16),
        pack_first_rank=np.array([0, 1, 0, 1, 0, 1, 0], dtype=np.int32),
        dropped=np.array([], dtype=np.int32),
        truncated=np.array([], dtype=np.int32),
    )


# Sample 4 has no target: neither has its pack.
NUM_TARGETS = np.array([1, 3, 20, 10, 0, 5, 50], dtype=np.int32)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        # Step 0 has 34 targets, step 1 has 5.
        (AveTokenLoss(), [1 / 34] * 4 + [None, 1 / 5, 1 / 50]),
        # Step 0 has 3 packs with targets: 4, 20 and 10 of them.
        (TokenMeanLoss(), [1 / 4 / 3, 1 / 4 / 3, 1 / 20 / 3, 1 / 10 / 3, None, 1 / 5, 1 / 50]),
        # Step 0 has 4 samples with targets.
        (SampleMeanLoss(), [1 / 1 / 4, 1 / 3 / 4, 1 / 20 / 4, 1 / 10 / 4, None, 1 / 5, 1 / 50]),
        # Step 0 has 2 ranks and 2 micro-steps, the others one micro-step.
        (SumLoss(), [1 / 4] * 4 + [None, 1 / 2, 1 / 2]),
        # Step 0 has a micro-step of 3 samples and one of 1.
        (LongAlignLoss(), [1 / 1 / 3 / 2, 1 / 3 / 3 / 2, 1 / 20 / 3 / 2, 1 / 10 / 1 / 2, None, 1 / 5, 1 / 50]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_by_hand(plan: EpochPlan, loss: Any, want: list[float | None]) -> None:
    weights = loss.document_weights(plan, NUM_TARGETS)
    assert weights.dtype == np.float64
    assert np.isfinite(weights).all()
    has_targets = NUM_TARGETS > 0
    np.testing.assert_allclose(weights[has_targets], [x for x in want if x is not None], rtol=1e-14)


@pytest.mark.parametrize("loss", [TokenMeanLoss(), SampleMeanLoss(), LongAlignLoss()], ids=lambda loss: type(loss).__name__)
def test_what_has_no_target_weighs_nothing(plan: EpochPlan, loss: Any) -> None:
    assert loss.document_weights(plan, NUM_TARGETS)[4] == 0
    # A whole micro-step without targets: the other one is the mean.
    without = np.array([1, 3, 20, 0, 0, 5, 50], dtype=np.int32)
    weights = loss.document_weights(plan, without)
    assert weights[3] == 0
    np.testing.assert_allclose((weights * without)[:4].sum(), 1, rtol=1e-14)


def test_longalign_is_the_papers_formula(plan: EpochPlan) -> None:
    # Equation 4 over the first micro-step alone: K = 2 packs, M = 3 samples, scaled by K / (N * M), summed, over K.
    first = NUM_TARGETS[:3]
    papers = 2 / (first * 3) / 2
    np.testing.assert_allclose(LongAlignLoss().document_weights(plan, NUM_TARGETS)[:3], papers / 2, rtol=1e-14)


def random_plan(seed: int) -> tuple[EpochPlan, NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 257, 100).astype(np.int32)
    num_targets = (lengths * rng.choice([0.1, 0.5, 0.9], 100)).astype(np.int32)
    num_targets[np.argsort(lengths)[-40:]] += 1
    planner = BalancePlanner(tokens_per_step=[512, 2048][seed % 2])
    return planner.plan(lengths, num_targets, GROUPS, world_size=4, seed=seed), num_targets


@pytest.mark.parametrize(
    "loss", [AveTokenLoss(), TokenMeanLoss(), SampleMeanLoss(), LongAlignLoss()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("seed", range(10))
def test_means_are_means(loss: Any, seed: int) -> None:
    """Equal token losses of 1 give a loss of 1 in every step, whatever the mean is over."""
    plan, num_targets = random_plan(seed)
    weights = loss.document_weights(plan, num_targets) * num_targets[plan.sample_ids]
    np.testing.assert_allclose(np.bincount(plan.pack_step[plan.pack_of_sample], weights=weights), 1, rtol=1e-12)


def totals_by(key: Callable[[int], int], weights: NDArray[np.float64], chosen: list[int]) -> set[float]:
    """Sum the weights of the chosen samples by key; give the different sums."""
    totals: dict[int, float] = {}
    for i in chosen:
        totals[key(i)] = totals.get(key(i), 0.0) + weights[i]
    return {round(total, 12) for total in totals.values()}


@pytest.mark.parametrize("seed", range(10))
def test_what_weighs_the_same_in_a_step(seed: int) -> None:
    plan, num_targets = random_plan(seed)
    pack, targets = plan.pack_of_sample, num_targets[plan.sample_ids]
    per_target = {loss: loss().document_weights(plan, num_targets) for loss in LOSSES}
    per_sample = {loss: weights * targets for loss, weights in per_target.items()}
    for step in range(plan.num_steps):
        mine = np.flatnonzero((plan.pack_step[pack] == step) & (targets > 0)).tolist()
        assert len(set(per_target[AveTokenLoss][mine])) == 1
        assert len(set(per_target[SumLoss][mine])) == 1
        assert len(totals_by(lambda i: int(pack[i]), per_sample[TokenMeanLoss], mine)) == 1
        assert len(totals_by(lambda i: i, per_sample[SampleMeanLoss], mine)) == 1
        assert len(totals_by(lambda i: int(plan.pack_micro_step[pack[i]]), per_sample[LongAlignLoss], mine)) == 1


def test_longalign_equals_the_sample_mean_in_steps_of_one_micro_step() -> None:
    lengths = np.random.default_rng(0).integers(1, 257, 100).astype(np.int32)
    plan = BalancePlanner().plan(lengths, lengths, GROUPS, world_size=4, seed=0)
    want = SampleMeanLoss().document_weights(plan, lengths)
    np.testing.assert_allclose(LongAlignLoss().document_weights(plan, lengths), want, rtol=1e-14)


def test_a_sample_that_is_drawn_twice_counts_twice(plan: EpochPlan) -> None:
    plan = replace(plan, sample_ids=np.array([0, 0, 2, 3, 4, 5, 6], dtype=np.int32))
    weights = SampleMeanLoss().document_weights(plan, NUM_TARGETS)
    np.testing.assert_allclose(weights[:4], [1 / 4, 1 / 4, 1 / 20 / 4, 1 / 10 / 4], rtol=1e-14)

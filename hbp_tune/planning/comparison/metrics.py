"""Metrics of a plan: the paper's (HBP paper, section 2.2), and what they mean in modelled cost and time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.balancing import attention_work
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.planning.plans.sharding import padded_len

_NUM_LENGTH_CLASSES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMetrics:
    """How well a plan uses the hardware; lower is better but for ``ave_t``. Ratios run from 0 (perfect) to 1.

    A micro-step is one synchronisation; its replicas are the ``world_size / cp_degree`` packs that run side by side.

    Args:
        dbr: dist balance ratio, idle share of real tokens over the replicas, mean over micro-steps.
        pr: padding ratio, padding over all token slots of packs that hold samples.
        pr_tail: slots of empty packs, which keep ranks without work in step, over all slots.
        abr: attention balance ratio, idle share of attention work over the replicas, mean over micro-steps.
        cr: communication ratio, share of real tokens in packs with a CP degree over 1.
        ave_t: mean real tokens per rank and micro-step.
        cbr: cost balance ratio, the formula of ``abr`` on modelled cost, attention and all else.
        idle: idle share of modelled cost over the epoch, so that long micro-steps count for more.
        p99_imbalance: 99th percentile of the idle share of modelled cost over optimizer steps.
        diversity: how far the steps of the group with most samples differ in what they are made of, over what random
            steps of the same size would; 1 is as random steps, less is steadier, see `diversity_by_group`.
        epoch_s: modelled seconds of the epoch (`CostModel`).
    """

    dbr: float
    pr: float
    pr_tail: float
    abr: float
    cr: float
    ave_t: float
    cbr: float
    idle: float
    p99_imbalance: float
    diversity: float
    epoch_s: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepMetrics:
    """The figures of each optimizer step, in training order; definitions as in `PlanMetrics`, over one step.

    Args:
        group: ``int64[num_steps]``, index into the plan's groups.
        tokens: ``int64[num_steps]``, real tokens over all ranks.
        squares: ``int64[num_steps]``, ``sum(len ** 2)`` over all documents.
        dbr: ``float64[num_steps]``, mean over the step's micro-steps.
        pr: ``float64[num_steps]``.
        abr: ``float64[num_steps]``, mean over the step's micro-steps.
        cr: ``float64[num_steps]``.
        modelled_s: ``float64[num_steps]``, modelled seconds, see `micro_step_s`.
    """

    group: NDArray[np.int64]
    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]
    dbr: NDArray[np.float64]
    pr: NDArray[np.float64]
    abr: NDArray[np.float64]
    cr: NDArray[np.float64]
    modelled_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.group)

    @classmethod
    def joined(cls, epochs: "Sequence[StepMetrics]", num_steps: Sequence[int]) -> "StepMetrics":
        """Put the first ``num_steps`` steps of each epoch one after the other: the steps of the run."""
        parts = list(zip(epochs, num_steps, strict=True))
        return cls(**{x.name: np.concatenate([getattr(epoch, x.name)[:steps] for epoch, steps in parts]) for x in fields(cls)})


def padded_lens(plan: EpochPlan) -> NDArray[np.int64]:
    """Token slots of each pack over its CP ranks, ``int64[packs]``."""
    tokens = plan.sum_per_pack(plan.lengths)
    slots = np.empty_like(tokens)
    for index, group in enumerate(plan.groups):
        mine = plan.pack_group == index
        slots[mine] = padded_len(tokens[mine], group.cp_degree, group.pack_len)
    return slots


def measure(plan: EpochPlan, cost: CostModel, classes: NDArray[np.int16] | None = None) -> PlanMetrics:
    """Compute the metrics.

    Args:
        plan: of one epoch.
        cost: of the model that is trained.
        classes: ``int16[num_samples]``, where each sample comes from; deciles of length by default.
    """
    tokens = plan.sum_per_pack(plan.lengths)
    squares = plan.sum_per_pack(attention_work(plan.lengths))
    costs = cost.pack_cost(tokens, squares)
    slots = padded_lens(plan)
    is_empty = np.diff(plan.pack_offsets) == 0
    micro_steps = plan.micro_step_starts
    # Ranks that share a pack share its cost: a micro-step lasts as long as its share.
    most_cost, mean_cost = (load / plan.cp_degrees[micro_steps] for load in _most_and_mean(costs, micro_steps))
    steps = plan.pack_step[micro_steps]
    step_idle = 1.0 - np.bincount(steps, weights=mean_cost) / np.bincount(steps, weights=most_cost)
    diversity = diversity_by_group(plan, classes)
    samples = np.bincount(plan.pack_group, weights=np.diff(plan.pack_offsets), minlength=len(plan.groups))
    return PlanMetrics(
        dbr=float(_idle_shares(tokens, micro_steps).mean()),
        pr=float((slots - tokens)[~is_empty].sum() / slots[~is_empty].sum()),
        pr_tail=float(slots[is_empty].sum() / slots.sum()),
        abr=float(_idle_shares(squares, micro_steps).mean()),
        cr=float(tokens[plan.cp_degrees > 1].sum() / tokens.sum()),
        ave_t=float(tokens.sum() / (len(micro_steps) * plan.world_size)),
        cbr=float(_idle_shares(costs, micro_steps).mean()),
        idle=float(1.0 - mean_cost.sum() / most_cost.sum()),
        p99_imbalance=float(np.quantile(step_idle, 0.99)),
        diversity=float(diversity[int(np.argmax(samples))]),
        epoch_s=float(micro_step_s(plan, cost).sum()),
    )


def measure_steps(plan: EpochPlan, cost: CostModel) -> StepMetrics:
    """Compute the figures of each optimizer step.

    Args:
        plan: of one epoch.
        cost: of the model that is trained.
    """
    tokens = plan.sum_per_pack(plan.lengths)
    squares = plan.sum_per_pack(attention_work(plan.lengths))
    slots = np.where(np.diff(plan.pack_offsets) > 0, padded_lens(plan), 0)
    micro_steps = plan.micro_step_starts
    step_of_micro_step = plan.pack_step[micro_steps]

    def over_packs(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(values, plan.step_starts)

    def over_micro_steps(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(step_of_micro_step, weights=values).astype(np.float64)

    num_micro_steps = np.bincount(step_of_micro_step)
    return StepMetrics(
        group=plan.step_groups.astype(np.int64),
        tokens=over_packs(tokens),
        squares=over_packs(squares),
        dbr=over_micro_steps(_idle_shares(tokens, micro_steps)) / num_micro_steps,
        pr=1.0 - over_packs(tokens) / over_packs(slots),
        abr=over_micro_steps(_idle_shares(squares, micro_steps)) / num_micro_steps,
        cr=over_packs(np.where(plan.cp_degrees > 1, tokens, 0)) / over_packs(tokens),
        modelled_s=over_micro_steps(micro_step_s(plan, cost)),
    )


def micro_step_s(plan: EpochPlan, cost: CostModel) -> NDArray[np.float64]:
    """Modelled seconds of each micro-step, ``float64[micro-steps]``: its slowest rank, or gathering weights if that is slower."""
    return simulate(PackWork.of_plan(plan), cost).micro_step_s


def diversity_by_group(plan: EpochPlan, classes: NDArray[np.int16] | None = None) -> NDArray[np.float64]:
    """Compare the make-up of each group's steps with that of random steps, ``float64[groups]``.

    The variance over steps of each class's share of tokens, summed over classes, divided by what it is expected to be where
    every sample of the group falls into any of the steps at random: ``(S - 1) * sum(len ** 2 * (1 - 2 p[class] + sum(p ** 2)))
    / tokens ** 2`` for S steps and classes with shares p of the group's tokens. Shuffling would estimate the same. Groups
    with fewer than two steps, or one class alone, give 1.

    Args:
        plan: of one epoch.
        classes: ``int16[num_samples]``, where each sample comes from; deciles of length by default.
    """
    if classes is None:
        borders = np.quantile(plan.lengths, np.arange(1, _NUM_LENGTH_CLASSES) / _NUM_LENGTH_CLASSES)
        placed_class = np.searchsorted(borders, plan.lengths)
    else:
        placed_class = classes[plan.sample_ids].astype(np.int64)
    num_classes = int(placed_class.max()) + 1
    pack_of_sample = plan.pack_of_sample
    tokens_of = np.bincount(
        plan.pack_step[pack_of_sample] * np.int64(num_classes) + placed_class,
        weights=plan.lengths,
        minlength=plan.num_steps * num_classes,
    ).reshape(-1, num_classes)
    group_of_step = plan.step_groups
    diversity = np.ones(len(plan.groups))
    group_of_sample = plan.pack_group[pack_of_sample]
    for index in range(len(plan.groups)):
        mine = tokens_of[group_of_step == index]
        if len(mine) < 2:
            continue
        share = mine.sum(axis=0) / mine.sum()
        is_mine = group_of_sample == index
        squares = np.bincount(placed_class[is_mine], weights=plan.lengths[is_mine].astype(np.float64) ** 2, minlength=num_classes)
        expected = (len(mine) - 1) * (squares * (1 - 2 * share + (share**2).sum())).sum() / mine.sum() ** 2
        if expected > 0:
            diversity[index] = (mine / mine.sum(axis=1, keepdims=True)).var(axis=0).sum() / expected
    return diversity


def _most_and_mean(load: NDArray[np.int64], starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Largest and mean load over the replicas of each micro-step."""
    num_replicas = np.diff(np.append(starts, len(load)))
    return np.maximum.reduceat(load, starts), np.add.reduceat(load, starts) / num_replicas


def _idle_shares(load: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give ``sum(max - load) / (max * N)`` of each micro-step, ``float64[micro-steps]``."""
    most, mean = _most_and_mean(load, starts)
    return 1.0 - mean / most

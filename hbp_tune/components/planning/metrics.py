"""The paper's metrics of a plan (HBP paper, section 2.2), averaged over synchronisations; lower is better but for Ave-T."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.balancing import attention_work
from hbp_tune.components.planning.records import EpochPlan
from hbp_tune.components.planning.sharding import padded_len


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMetrics:
    """How well a plan uses the hardware; ratios run from 0 (perfect) to 1.

    Args:
        dbr: dist balance ratio, idle share of token slots over the replicas of a micro-step.
        pr: padding ratio, padding over all token slots of packs that hold samples.
        pr_tail: slots of empty packs, which keep ranks without work in step, over all slots.
        abr: attention balance ratio, idle share of attention work over the replicas of a micro-step.
        cr: communication ratio, share of real tokens in packs with a CP degree over 1.
        ave_t: mean real tokens per rank and micro-step.
    """

    dbr: float
    pr: float
    pr_tail: float
    abr: float
    cr: float
    ave_t: float


def padded_lens(plan: EpochPlan) -> NDArray[np.int64]:
    """Token slots of each pack over its CP ranks, ``int64[packs]``."""
    tokens = plan.sum_per_pack(plan.lengths)
    groups = [plan.groups[index] for index in plan.pack_group]
    return np.array([padded_len(int(n), g.cp_degree, g.pack_len) for n, g in zip(tokens, groups, strict=True)], dtype=np.int64)


def measure(plan: EpochPlan) -> PlanMetrics:
    """Compute the metrics; a micro-step is one synchronisation, its replicas are ``world_size / cp_degree``."""
    tokens = plan.sum_per_pack(plan.lengths)
    work = plan.sum_per_pack(attention_work(plan.lengths))
    slots = padded_lens(plan)
    is_empty = np.diff(plan.pack_offsets) == 0
    micro_steps = np.flatnonzero(plan.pack_first_rank == 0)  # each micro-step starts at rank 0
    return PlanMetrics(
        dbr=_idle_share(slots, micro_steps),
        pr=float((slots - tokens)[~is_empty].sum() / slots[~is_empty].sum()),
        pr_tail=float(slots[is_empty].sum() / slots.sum()),
        abr=_idle_share(work, micro_steps),
        cr=float(tokens[plan.cp_degrees > 1].sum() / tokens.sum()),
        ave_t=float(tokens.sum() / (len(micro_steps) * plan.world_size)),
    )


def _idle_share(load: NDArray[np.int64], starts: NDArray[np.int64]) -> float:
    """Mean over micro-steps of ``sum(max - load) / (max * N)``."""
    num_replicas = np.diff(np.append(starts, len(load)))
    most = np.maximum.reduceat(load, starts)
    total = np.add.reduceat(load, starts)
    return float(np.mean(1.0 - total / (most * num_replicas)))

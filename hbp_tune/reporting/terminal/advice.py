"""What a person should take from a plan: whether it pays, in one sentence, and what to mend before training by it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.comparison.metrics import PlanMetrics, micro_step_s
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.formats import time_unit, write_share

# The modelled seconds are not exact enough for less.
_LEAST_GAIN = 0.02
# Differences that move the modelled time by a few percent: waiting, tokens that are exchanged, layers computed again.
_LEAST_IDLE, _LEAST_SPLIT, _LEAST_RECOMPUTED = 0.02, 0.05, 0.1
# Of the cost, below which balancing it cannot matter; of the tokens, from which on their exchange cannot be saved.
_SMALL_ATTENTION = 0.1
_MUCH_SPLIT = 0.5
# Of the modelled time, what is worth a word.
_LEAST_SHOWN = 0.005


def headline(plan: EpochPlan, naive: EpochPlan, *, metrics: PlanMetrics, naive_metrics: PlanMetrics, cost: CostModel) -> str:
    """Say in one sentence whether the plan beats one-length packing of the same data, by how much, and why (not).

    Args:
        plan: of one epoch.
        naive: of the same samples in packs of one length, on the same ranks.
        metrics: of ``plan``.
        naive_metrics: of ``naive``.
        cost: by which both were measured.
    """
    speedup = naive_metrics.epoch_s / metrics.epoch_s
    if speedup < 1.0 + _LEAST_GAIN:
        verdict = "will not help" if speedup > 1.0 - _LEAST_GAIN else "would cost time"
        reason = _why_not(plan, metrics, naive_metrics, cost)
        return f"HBP {verdict} with these data and groups (modelled {speedup:.2f}x): {reason}."
    shares = [
        (f"{what} {write_share(naive_share)}{of_what}", write_share(share))
        for what, naive_share, share, least, of_what in (
            ("idle", naive_metrics.idle, metrics.idle, _LEAST_IDLE, ""),
            ("split", naive_metrics.cr, metrics.cr, _LEAST_SPLIT, " of the tokens over ranks"),
            ("recompute", _recomputed(naive, cost), _recomputed(plan, cost), _LEAST_RECOMPUTED, " of the layers"),
        )
        if naive_share - share >= least
    ]
    if not shares:
        return f"HBP is modelled {speedup:.2f}x as fast as one-length packing."
    if len(shares) == 1:
        return f"One-length packing would {shares[0][0]}, this plan {shares[0][1]}: HBP is modelled {speedup:.2f}x as fast."
    *first, last = [f"{would} (this plan {does})" for would, does in shares]
    return f"One-length packing would {', '.join(first)} and {last}: HBP is modelled {speedup:.2f}x as fast."


def plan_warnings(plan: EpochPlan) -> list[str]:
    """Find groups that do not earn their keep, each with what to do about it.

    Args:
        plan: of the first epoch; other epochs draw other packs from the same samples.

    Returns:
        A line for each group without samples, with fewer packs than replicas, or with a CP degree that no sample needs.
    """
    found = []
    num_docs = np.diff(plan.pack_offsets)
    shorter = None
    for index, group in enumerate(plan.groups):
        mine = plan.pack_group == index
        num_packs = np.count_nonzero(mine & (num_docs > 0))
        replicas = plan.world_size // group.cp_degree
        if not num_packs:
            more_than = f"more than {shorter.pack_len:,} and " if shorter else ""
            found.append(
                f"group {group.name!r} stays empty: no sample has {more_than}at most {group.pack_len:,} tokens; remove it"
            )
            continue
        if num_packs < replicas:
            found.append(
                f"group {group.name!r} fills {num_packs} packs for {replicas} replicas, the others idle meanwhile: its "
                f"{int(num_docs[mine].sum()):,} samples are too few; add some, raise its cp_degree, or train on fewer ranks"
            )
        longest = int(plan.lengths[np.repeat(mine, num_docs)].max())
        if line := _needless_split(group, shorter, longest):
            found.append(line)
        shorter = group
    return found


def expected_time(plans: Sequence[EpochPlan], cost: CostModel, max_steps: int | None = None) -> str:
    """Say how long an epoch and the run take, what they cost, and where the time of the first epoch goes, for people.

    Args:
        plans: of the run's epochs.
        cost: predicts the seconds.
        max_steps: optimizer steps after which the run ends, if it ends before its epochs do.
    """
    run_s, run_steps = 0.0, 0
    for plan in plans:
        num_steps = plan.num_steps if max_steps is None else min(plan.num_steps, max_steps - run_steps)
        step = plan.pack_step[plan.micro_step_starts]  # of each micro-step
        run_s += float(micro_step_s(plan, cost)[step < num_steps].sum())
        run_steps += num_steps
    first, gpus = plans[0], plans[0].world_size
    epoch = simulate(PackWork.of_plan(first), cost)
    epoch_s = epoch.epoch_s
    spent = ", ".join(f"{write_share(share)} {name}" for name, share in epoch.shares.items() if share >= _LEAST_SHOWN)
    return (
        f"Modelled for {gpus} {cost.rates.machine}s: {_duration(epoch_s)} an epoch of {first.num_steps:,} steps, "
        f"{_duration(run_s)} or {run_s * gpus / 3600:,.1f} GPU hours the run of {run_steps:,} steps. "
        f"Of all ranks' time: {spent}."
    )


def _needless_split(group: PackingGroup, shorter: PackingGroup | None, longest: int) -> str | None:
    """Find the smallest split that holds the longest sample with as many tokens a rank, hence in the same memory."""
    local_len = group.pack_len // group.cp_degree
    degrees = (degree for degree in range(1, group.cp_degree + 1) if group.cp_degree % degree == 0)
    needed = next(degree for degree in degrees if degree * local_len >= longest)
    if needed == group.cp_degree:
        return None
    found = f"group {group.name!r}: no sample needs cp_degree={group.cp_degree}, the longest has {longest:,} tokens"
    if shorter is not None and longest <= shorter.pack_len:
        return f"{found} and fits group {shorter.name!r}; try without the group"
    return f"{found}; pack_len={needed * local_len}, cp_degree={needed} holds it with as many tokens a rank and less exchange"


def _why_not(plan: EpochPlan, metrics: PlanMetrics, naive_metrics: PlanMetrics, cost: CostModel) -> str:
    """Name what the data lack for balance packing to pay."""
    num_samples, num_packs = len(plan.sample_ids), np.count_nonzero(np.diff(plan.pack_offsets))
    replicas = plan.world_size // int(plan.cp_degrees.min())
    if num_packs < replicas:
        return f"{num_samples:,} {'samples fill' if num_samples > 1 else 'sample fills'} {num_packs} of {replicas} replicas"
    idle = f"one-length packing idles {write_share(naive_metrics.idle)}, this plan {write_share(metrics.idle)}"
    longest, room = int(plan.lengths.max()), plan.groups[0].pack_len
    if longest <= room:
        attention = _attention_share(plan.lengths, cost)
        small = f"attention is only {write_share(attention)} of their cost"
        return (
            f"all samples fit the shortest group (the longest has {longest:,} of {room:,} tokens), and "
            f"{small if attention < _SMALL_ATTENTION else idle}"
        )
    if metrics.cr >= _MUCH_SPLIT:
        return f"{write_share(metrics.cr)} of the tokens are split over ranks in any case, and {idle}"
    return idle


def _attention_share(lengths: NDArray[np.int32], cost: CostModel) -> float:
    """Give attention's share of the operations, 0 to 1."""
    total = int(cost.sample_cost(lengths).sum())
    return 1.0 - cost.double_len * int(lengths.sum(dtype=np.int64)) / total


def _recomputed(plan: EpochPlan, cost: CostModel) -> float:
    """Give the share of layers that recompute their activations, 0 to 1, averaged over tokens."""
    layers = np.array([group.ac_layers for group in plan.groups])[plan.pack_group]
    tokens = plan.sum_per_pack(plan.lengths)
    return float((layers * tokens).sum() / (tokens.sum() * cost.shape.num_layers))


def _duration(duration_s: float) -> str:
    scale, _, unit = time_unit(duration_s)
    return f"{duration_s / scale:,.1f} {unit}"

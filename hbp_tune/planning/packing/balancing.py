"""Packs to optimizer steps, so that the ranks of one micro-step have like work."""

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.lpt import lpt
from hbp_tune.planning.plans.packs import Packs

SORTS = ("attention", "cost", "tokens", None)


def attention_work(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Attention work of each document, ``len ** 2`` (HBP paper, section 3.2); half of it under a causal mask."""
    return lengths.astype(np.int64) ** 2


def work_by(sort_by: str | None, lengths: NDArray[np.int32], cost: CostModel) -> NDArray[np.int64]:
    """Work of each document by what packs are sorted by: attention, modelled cost or tokens; attention where unsorted."""
    if sort_by == "cost":
        return cost.sample_cost(lengths)
    return lengths.astype(np.int64) if sort_by == "tokens" else attention_work(lengths)


def spread_tail(packs: Packs, lengths: NDArray[np.int32], *, num_replicas: int, pack_len: int) -> Packs:
    """Make the number of packs a multiple of the replicas without leaving replicas idle.

    As many neighbouring packs as are too many are dealt out again over ``num_replicas`` packs, longest sample first to the
    pack with the least attention work that has room (LPT). Of packs sorted by work, those are taken whose removal lets the
    others go together best: few and small samples divide well, and where neighbours are unlike, as packs of nothing but
    small samples are unlike the next, no micro-step holds both. Where there are fewer samples than replicas, packs stay
    empty.

    Returns:
        The packs, in their order but for the spread ones, which come first; a multiple of ``num_replicas``.
    """
    num_tail = len(packs) % num_replicas
    if not num_tail:
        return packs
    first = _best_tail(packs, lengths, num_tail, num_replicas)
    tail = packs.span(first, first + num_tail)
    ids = tail.ids[np.argsort(-lengths[tail.ids], kind="stable")]
    place = np.empty(len(ids), dtype=np.int64)
    if lpt(lengths[ids].astype(np.int64), 0, num_replicas, pack_len, place):
        spread = Packs.from_places(ids, place, num_replicas)
    else:  # very full tails of long samples may not divide: leave them as they were, with empty partners
        spread = tail.padded(num_replicas)
    return Packs.joined([spread, packs.span(0, first), packs.span(first + num_tail, len(packs))])


def _best_tail(packs: Packs, lengths: NDArray[np.int32], num_tail: int, num_replicas: int) -> int:
    """Say where the tail's packs start: a multiple of ``num_replicas``, so that whole micro-steps lie before and after."""
    work = packs.sums(attention_work(lengths))
    num_slices = len(packs) // num_replicas
    idle = [
        np.append(1.0 - part.mean(axis=1) / part.max(axis=1), 0.0)  # of each micro-step, where the tail lies behind or before it
        for part in (work[: num_slices * num_replicas].reshape(-1, num_replicas), work[num_tail:].reshape(-1, num_replicas))
    ]
    before = np.cumsum(np.append(0.0, idle[0][:-1]))
    after = np.cumsum(idle[1][::-1])[::-1]
    # Dealt out, the tail's longest sample sets the pace unless there is work enough for the others.
    starts = np.arange(num_slices + 1) * num_replicas
    tail_work = np.add.reduceat(np.append(work, 0), np.stack((starts, starts + num_tail), axis=1).ravel())[::2] / num_replicas
    longest = np.maximum.reduceat(lengths[packs.ids], packs.offsets[:-1])
    longest_work = attention_work(np.array([longest[start : start + num_tail].max() for start in starts]))
    return int(np.argmin(before + after + 1.0 - tail_work / np.maximum(tail_work, longest_work))) * num_replicas


def deal_micro_steps(num_slices: int, accumulation: int) -> NDArray[np.int64]:
    """Deal a group's micro-steps, sorted by work, to optimizer steps, so that each step holds light and heavy ones.

    Args:
        num_slices: micro-steps of the group in the epoch.
        accumulation: wanted micro-steps per optimizer step; no partial step is made, some hold one more or less.

    Returns:
        ``int64[num_slices]``, the step of each micro-step.
    """
    num_steps = max(1, int(num_slices / accumulation + 0.5))
    return np.arange(num_slices) % num_steps

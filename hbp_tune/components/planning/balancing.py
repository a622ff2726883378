"""Packs to optimizer steps, so that the ranks of one micro-step have like attention work."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# One pack while it is planned: the ids of its samples, in order.
Pack = NDArray[np.int64]


def attention_work(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Attention work of each document, ``len ** 2`` (HBP paper, section 3.2); half of it under a causal mask."""
    return lengths.astype(np.int64) ** 2


def sort_by_attention(packs: Sequence[Pack], lengths: NDArray[np.int32]) -> list[Pack]:
    """Sort packs by attention work, so that neighbours cost alike (HBP paper, Algorithm 2, balance batching)."""
    work = np.array([attention_work(lengths[pack]).sum() for pack in packs], dtype=np.int64)
    return [packs[i] for i in np.argsort(work, kind="stable")]


def spread_tail(packs: list[Pack], lengths: NDArray[np.int32], *, num_replicas: int, pack_len: int) -> list[Pack]:
    """Make the number of packs a multiple of the replicas without leaving replicas idle.

    The first ``len(packs) % num_replicas`` packs are dealt out again over ``num_replicas`` packs, longest sample first
    to the pack with the least attention work that has room (LPT). They should be those with the least attention work:
    many short samples, which divide well. Where there are fewer samples than replicas, packs stay empty.

    Returns:
        The packs, the spread ones first; their number is a multiple of ``num_replicas``.
    """
    num_tail = len(packs) % num_replicas
    if not num_tail:
        return packs
    tail_ids = np.concatenate(packs[:num_tail])
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    load = [(0, 0, replica) for replica in range(num_replicas)]  # (attention work, tokens, replica)
    for sample in tail_ids[np.argsort(-lengths[tail_ids], kind="stable")]:
        length = int(lengths[sample])
        tried = []
        while load and load[0][1] + length > pack_len:
            tried.append(heapq.heappop(load))
        if not load:  # very full tails of long samples may not divide: leave them as they were, with empty partners
            return [*packs[:num_tail], *(np.empty(0, dtype=np.int64) for _ in range(num_replicas - num_tail)), *packs[num_tail:]]
        work, tokens, replica = heapq.heappop(load)
        dealt[replica].append(int(sample))
        for entry in (*tried, (work + length * length, tokens + length, replica)):
            heapq.heappush(load, entry)
    return [*(np.array(ids, dtype=np.int64) for ids in dealt), *packs[num_tail:]]


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

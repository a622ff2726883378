"""Levelling by cost: packs of unequal token counts whose modelled cost is the same, as varlen kernels like them.

Two ways to the same end. Short samples are plenty: windows of random samples are dealt to the packs of a few optimizer
steps (`level_windows`), which keeps steps as diverse as random ones. Long samples are few and some of them cost more than
any mixture of others: neighbours in length share a micro-step, and shorter samples fill it up to its level (`level_heavy`,
`fill_level`).
"""

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.balancing import deal_micro_steps
from hbp_tune.planning.packing.lpt import lpt
from hbp_tune.planning.plans.packs import Packs
from hbp_tune.planning.plans.records import PackingGroup

# The longest sample of a group must leave room for levelling: at 1.00 steps idle 0.4%, at 0.96 0.04% (32 replicas of 16K).
_LIMIT_SHARE = 0.96
# Up to this share of a group's tokens may move on to the next group.
_FEW_SHARE = 0.05
# Shares of the token slots to fill, the fullest first: the cheapest packs reach their length before they reach the level.
_FILLS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.94, 0.92, 0.89, 0.85, 0.8, 0.7, 0.6, 0.5)
# Per cent of idle time that a per cent of padding is worth: slots cost varlen kernels nothing, more steps cost a little.
_FILL_PRICE = 0.02
# Windows of at least this many packs are dealt together: 32 idle 0.15%, 128 0.04%, and steps stay as diverse.
_WINDOW_PACKS = 128
_PILOT_WINDOWS = 4


def cost_limit(lengths: NDArray[np.int32], pack_len: int, cost: CostModel, num_replicas: int) -> int:
    """Give the longest sample that costs no more than a mean full pack of samples up to that length, less a margin.

    A longer one holds up the other replicas of its micro-step; where there is a single replica none is held up.

    Args:
        lengths: ``int32[n]``, candidates of the group, each at most ``pack_len``.
        pack_len: tokens that a pack holds.
        cost: of a sample.
        num_replicas: packs of a micro-step.

    Returns:
        At most ``pack_len``; less than every length where none is worth a limit.
    """
    if num_replicas == 1:
        return pack_len
    ascending = np.sort(lengths).astype(np.int64)
    tokens, costs = np.cumsum(ascending), np.cumsum(cost.sample_cost(ascending))
    limit, end = pack_len, len(ascending)
    while end:
        mean_cost = int(costs[end - 1]) / int(tokens[end - 1])
        lower = int(longest_within(int(_LIMIT_SHARE * pack_len * mean_cost), cost.double_len))
        if lower >= limit:
            break
        limit, end = lower, int(np.searchsorted(ascending, lower, side="right"))
    return limit


def group_by_cost(
    lengths: NDArray[np.int32], groups: Sequence[PackingGroup], cost: CostModel, world_size: int
) -> NDArray[np.int64]:
    """Assign each sample to the shortest group that holds it and whose mean full pack costs as much.

    Args:
        lengths: ``int32[n]``, of the samples to plan.
        groups: from short to long.
        cost: of a sample.
        world_size: ranks of the run.

    Returns:
        ``int64[n]``, index into ``groups``. Where more than a few of a group's samples would move on, none does: they keep
        each other company.
    """
    borders = [group.pack_len for group in groups]
    for index, group in enumerate(groups[:-1]):
        shorter = borders[index - 1] if index else 0
        own = lengths[(lengths > shorter) & (lengths <= group.pack_len)]
        limit = cost_limit(own, group.pack_len, cost, world_size // group.cp_degree)
        if own[own > limit].sum(dtype=np.int64) <= _FEW_SHARE * own.sum(dtype=np.int64):
            borders[index] = limit
    return np.searchsorted(borders, lengths)


@njit(cache=True)  # type: ignore[untyped-decorator]
def longest_within(budget: int, double_len: int) -> int:
    """Give the longest document whose cost ``len * (len + double_len)`` is at most ``budget``."""
    length = int((np.sqrt(float(double_len) ** 2 + 4.0 * budget) - double_len) / 2.0)
    while length * (length + double_len) > budget:  # floating point only comes near
        length -= 1
    while (length + 1) * (length + 1 + double_len) <= budget:
        length += 1
    return length


def level_windows(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    cost: CostModel,
    *,
    pack_len: int,
    num_replicas: int,
    accumulation: int,
    heavy_slices: int = 0,
) -> tuple[Packs, NDArray[np.int64]]:
    """Deal samples to steps whose packs all cost the same.

    Samples are taken in the given (hashed) order; a window of them is dealt by LPT to the packs of as many steps as make
    about 128 packs, whose packs are then sorted by cost and cut into micro-steps.

    Args:
        ids: ``int32[n]``, in random order.
        lengths: ``int32[num_samples]``.
        cost: balanced by.
        pack_len: tokens that a pack holds.
        num_replicas: packs of a micro-step.
        accumulation: wanted micro-steps of an optimizer step.
        heavy_slices: micro-steps of the same group that `level_heavy` made, to divide over the same steps.

    Returns:
        Packs, micro-step after micro-step, and ``int64[heavy_slices + micro-steps]``, the step of each of the heavy
        micro-steps, then of these. Steps have as many micro-steps as each other, or one more: there is no partial one, but
        for a micro-step less where samples of more than half a pack would have left one empty.
    """
    own = lengths[ids].astype(np.int64)
    costs = np.concatenate(([0], np.cumsum(cost.sample_cost(own))))
    fill = _best_fill(own, costs, cost, pack_len, num_replicas, accumulation)
    steps_per_window = max(1, -(-_WINDOW_PACKS // (num_replicas * accumulation)))
    while True:
        num_slices = int(np.ceil(own.sum() / (fill * num_replicas * pack_len)))
        # Micro-steps are divided in turn, first the windows' and then the heavy ones.
        step_of_slice = deal_micro_steps(num_slices + heavy_slices, accumulation)
        step_slices = np.bincount(step_of_slice[:num_slices], minlength=int(step_of_slice.max()) + 1)
        window_slices = np.add.reduceat(step_slices, np.arange(0, len(step_slices), steps_per_window))
        each, over = divmod(int(costs[-1]), num_slices)  # apart, as the whole times the slices may not fit 64 bits
        up_to = np.cumsum(window_slices)
        ends = np.searchsorted(costs[1:], each * up_to + over * up_to // num_slices, side="right")
        ends[-1] = len(own)
        place = np.empty(len(own), dtype=np.int64)
        if _deal_windows(own, ends, window_slices * num_replicas, cost.double_len, pack_len, place):
            break
        fill *= 0.97
    packs = Packs.from_places(ids, place, num_slices * num_replicas)
    window_of_pack = np.repeat(np.arange(len(window_slices)), window_slices * num_replicas)
    packs = packs.take(np.lexsort((packs.sums(cost.sample_cost(lengths)), window_of_pack)))
    # Inside a window each step takes every so many-th micro-step: light and heavy ones alike.
    first_step = np.arange(len(window_slices)) * steps_per_window
    first_slice = np.cumsum(window_slices) - window_slices
    in_window = np.arange(num_slices) - np.repeat(first_slice, window_slices)
    window_steps = np.minimum(steps_per_window, len(step_slices) - first_step)
    steps = np.repeat(first_step, window_slices) + in_window % np.repeat(window_steps, window_slices)
    # Where samples are about as long as a pack, a window may have fewer of them than packs.
    is_filled = (np.diff(packs.offsets) > 0).reshape(-1, num_replicas).any(axis=1)
    packs = packs.take(np.flatnonzero(np.repeat(is_filled, num_replicas)))
    return packs, np.concatenate((step_of_slice[num_slices:], steps[is_filled]))


def _best_fill(
    own: NDArray[np.int64], costs: NDArray[np.int64], cost: CostModel, pack_len: int, num_replicas: int, accumulation: int
) -> float:
    """Try shares of the token slots on the first windows; the price of idle time and of padding decides."""
    num_packs = -(-max(_WINDOW_PACKS, num_replicas * accumulation) // num_replicas) * num_replicas
    best, best_price = _FILLS[-1], np.inf
    for fill in _FILLS:
        budget = int(fill * num_packs * pack_len * (costs[-1] / own.sum()))
        num_windows = min(_PILOT_WINDOWS, int(costs[-1]) // budget)
        ends = np.searchsorted(costs[1:], budget * np.arange(1, num_windows + 1), side="right")
        packs = np.full(num_windows, num_packs)
        if not num_windows:  # all of them are less than a window
            ends = np.array([len(own)])
            packs = np.array([num_replicas * int(np.ceil(own.sum() / (fill * num_replicas * pack_len)))])
        pilot = own[: ends[-1]]
        place = np.empty(len(pilot), dtype=np.int64)
        if not _deal_windows(pilot, ends, packs, cost.double_len, pack_len, place):
            continue
        load = np.bincount(place, weights=cost.sample_cost(pilot), minlength=packs.sum()).astype(np.int64)
        slices = np.sort(load.reshape(len(packs), -1), axis=1).reshape(-1, num_replicas)
        price = _price(slices.max(axis=1, keepdims=True) - slices, slices, fill)
        if price < best_price:
            best, best_price = fill, price
    return best


def _price(idle: NDArray[np.int64], load: NDArray[np.int64], fill: float) -> float:
    """Weigh idle time against padding; from sums of whole numbers, which no machine rounds its own way."""
    return int(idle.sum()) / int(load.max(axis=1).sum() * load.shape[1]) + _FILL_PRICE * (1 - fill)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _deal_windows(
    lengths: NDArray[np.int64],
    ends: NDArray[np.int64],
    window_packs: NDArray[np.int64],
    double_len: int,
    pack_len: int,
    place: NDArray[np.int64],
) -> bool:
    """Deal each window by LPT; packs are numbered through. Stops at the first window that does not fit, and says so."""
    start, first_pack = 0, 0
    for window in range(len(ends)):
        end = ends[window]
        # Length and position in one number: sorted descending by length, ties by position.
        keys = np.empty(end - start, dtype=np.int64)
        for i in range(end - start):
            keys[i] = (-lengths[start + i] << 32) | i
        keys.sort()
        order = keys & 0xFFFFFFFF
        dealt = np.empty(end - start, dtype=np.int64)
        if not lpt(lengths[start:end][order], double_len, window_packs[window], pack_len, dealt):
            return False
        for i in range(end - start):
            place[start + order[i]] = first_pack + dealt[i]
        start = end
        first_pack += window_packs[window]
    return True


def level_heavy(
    ids: NDArray[np.int32], lengths: NDArray[np.int32], cost: CostModel, *, pack_len: int, num_replicas: int
) -> Packs:
    """Put long samples into micro-steps so that the packs of each cost about the same.

    Samples that alone cost more than a mean pack head micro-steps of their own, neighbours in length together, which the
    largest others that fit below the head's cost fill up. The rest is dealt by LPT and sorted by cost.

    Args:
        ids: ``int32[n]``, at least one.
        lengths: ``int32[num_samples]``.
        cost: balanced by.
        pack_len: tokens that a pack holds.
        num_replicas: packs of a micro-step.

    Returns:
        Packs, micro-step after micro-step from the heaviest on; their number is a multiple of ``num_replicas``.
    """
    ids = ids[np.argsort(-lengths[ids], kind="stable")]
    own = lengths[ids].astype(np.int64)
    place = np.full(len(ids), -1, dtype=np.int64)
    num_headed = 0
    if num_replicas > 1:  # a single one waits for no other
        num_headed = _head_slices(own, cost.double_len, pack_len, num_replicas, place) * num_replicas
    rest = np.flatnonzero(place < 0)
    num_packs = 0
    if len(rest):
        place[rest], num_packs = _deal_evenly(own[rest], cost, pack_len, num_replicas)
        place[rest] += num_headed
    return Packs.from_places(ids, place, num_headed + num_packs)


def _deal_evenly(lengths: NDArray[np.int64], cost: CostModel, pack_len: int, num_replicas: int) -> tuple[NDArray[np.int64], int]:
    """Deal descending lengths by LPT into whole micro-steps; gives the pack of each, heaviest packs first, and their number.

    As in `_best_fill`, idle time and padding have a price; what shorter samples can fill up later is not idle.
    """
    one_each = -(-len(lengths) // num_replicas)
    best, best_price = np.empty(0, dtype=np.int64), np.inf
    for fill in (*_FILLS, 0.0):
        # In the end every sample has a pack of its own, which always fits; more packs would stay empty.
        slices = min(one_each, int(np.ceil(lengths.sum() / (fill * num_replicas * pack_len)))) if fill else one_each
        place = np.empty(len(lengths), dtype=np.int64)
        if (fill == 0.0 and len(best)) or not lpt(lengths, cost.double_len, slices * num_replicas, pack_len, place):
            continue
        load, tokens = (
            np.bincount(place, weights=values, minlength=slices * num_replicas).astype(np.int64)
            for values in (cost.sample_cost(lengths), lengths)
        )
        order = np.argsort(-load, kind="stable")
        sliced = load[order].reshape(-1, num_replicas)
        fillable = (pack_len - tokens[order]).reshape(sliced.shape) * cost.double_len
        price = _price(np.maximum(0, sliced.max(axis=1, keepdims=True) - sliced - fillable), sliced, fill)
        if price < best_price:
            best, best_price = np.argsort(order)[place], price
    return best, num_replicas * (int(best.max()) // num_replicas + 1)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _head_slices(lengths: NDArray[np.int64], double_len: int, pack_len: int, num_replicas: int, place: NDArray[np.int64]) -> int:
    """Make the micro-steps whose heaviest sample costs more than the mean pack of what is left; gives their number.

    `lengths` descend; `place` is -1 on input and stays so for samples that head no micro-step.
    """
    size = len(lengths)
    following = np.arange(size + 1)  # union-find: the next sample from here on that is not placed
    left_tokens = lengths.sum()
    left_cost = (lengths * (lengths + double_len)).sum()
    ascending = lengths[::-1].copy()
    num_slices, first = 0, 0
    while first < size:
        level = lengths[first] * (lengths[first] + double_len)
        packs_left = -(-left_tokens // (pack_len * num_replicas)) * num_replicas
        if level * packs_left <= left_cost:
            break
        for replica in range(num_replicas):
            room, gap = pack_len, level
            while True:
                longest = min(room, longest_within(gap, double_len))
                start = size - np.searchsorted(ascending, longest, side="right")
                while following[start] != start:  # path halving
                    following[start] = following[following[start]]
                    start = following[start]
                if start >= size:
                    break
                length = lengths[start]
                place[start] = num_slices * num_replicas + replica
                following[start] = start + 1
                room -= length
                gap -= length * (length + double_len)
                left_tokens -= length
                left_cost -= length * (length + double_len)
        num_slices += 1
        while following[first] != first:
            first = following[first]
    return num_slices


def fill_level(
    packs: Packs, candidates: NDArray[np.int32], lengths: NDArray[np.int32], cost: CostModel, *, pack_len: int, num_replicas: int
) -> tuple[Packs, NDArray[np.int32]]:
    """Fill each micro-step's packs with shorter samples up to its most costly pack: time that would be idle.

    Args:
        packs: micro-step after micro-step.
        candidates: ``int32[n]``, sample ids in the order in which they are tried.
        lengths: ``int32[num_samples]``.
        cost: balanced by.
        pack_len: tokens that a pack holds.
        num_replicas: packs of a micro-step.

    Returns:
        The packs with what they took, and the candidates that are left, in their order.
    """
    load = packs.sums(cost.sample_cost(lengths)).reshape(-1, num_replicas)
    gap = (load.max(axis=1, keepdims=True) - load).ravel()
    room = pack_len - packs.sums(lengths.astype(np.int64))
    # One kind of pack, so that a candidate has one load.
    candidate_load = cost.sample_cost(lengths[candidates])[:, None]
    one_kind = np.zeros(len(packs), dtype=np.int64)
    taken = fill_gaps(lengths[candidates].astype(np.int64), candidate_load, one_kind, room, gap)
    is_taken = taken >= 0
    ids = np.concatenate((packs.ids, candidates[is_taken]))
    place = np.concatenate((np.repeat(np.arange(len(packs)), np.diff(packs.offsets)), taken[is_taken]))
    return Packs.from_places(ids, place, len(packs)), candidates[~is_taken]


@njit(cache=True)  # type: ignore[untyped-decorator]
def fill_gaps(
    lengths: NDArray[np.int64],
    load: NDArray[np.number],
    kind: NDArray[np.int64],
    room: NDArray[np.int64],
    gap: NDArray[np.number],
) -> NDArray[np.int64]:
    """Walk round the candidates; each pack takes those that fit its room and gap until 32 in a row do not.

    Args:
        lengths: ``int64[n]``, of the candidates.
        load: ``[n, kinds]``, what a candidate adds to the load of a pack of each kind.
        kind: ``int64[packs]``.
        room: ``int64[packs]``, tokens that each pack can still take; changed in place.
        gap: ``[packs]``, load that each pack can still take; changed in place.

    Returns:
        ``int64[n]``, the pack of each candidate, or -1.
    """
    size = len(lengths)
    taken = np.full(size, -1, dtype=np.int64)
    cursor, left = 0, size
    for pack in range(len(room)):
        refused = 0
        while left and refused < min(32, size):
            if taken[cursor] < 0 and lengths[cursor] <= room[pack] and load[cursor, kind[pack]] <= gap[pack]:
                taken[cursor] = pack
                room[pack] -= lengths[cursor]
                gap[pack] -= load[cursor, kind[pack]]
                left -= 1
                refused = 0
            else:
                refused += 1
            cursor = cursor + 1 if cursor + 1 < size else 0
    return taken

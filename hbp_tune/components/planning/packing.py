"""Samples to packs: first-fit over a tree, used both to open packs and to fill the room left in them."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)  # type: ignore[untyped-decorator]
def _first_fit(lengths: NDArray[np.int32], room: NDArray[np.int64], opened: int, capacity: int, place: NDArray[np.int64]) -> int:
    """Place each sample into the first pack with room for it; `room` is a tournament tree whose leaves are the packs."""
    leaves = len(room) // 2
    for i in range(len(lengths)):
        length = lengths[i]
        if room[1] >= length:
            node = 1
            while node < leaves:  # descend to the leftmost pack that has room
                node *= 2
                if room[node] < length:
                    node += 1
        elif capacity > 0:
            node = leaves + opened
            room[node] = capacity
            opened += 1
        else:
            place[i] = -1
            continue
        place[i] = node - leaves
        room[node] -= length
        node //= 2
        while node >= 1:
            room[node] = max(room[2 * node], room[2 * node + 1])
            node //= 2
    return opened


def _tree(leaf_room: NDArray[np.int64], num_leaves: int) -> NDArray[np.int64]:
    """Build the tournament tree: node i holds the most room below it; unopened packs have none."""
    leaves = 1 << max(1, int(num_leaves - 1).bit_length())
    room = np.zeros(2 * leaves, dtype=np.int64)
    room[leaves : leaves + len(leaf_room)] = leaf_room
    level = leaves
    while level > 1:
        room[level // 2 : level] = np.maximum(room[level : 2 * level : 2], room[level + 1 : 2 * level : 2])
        level //= 2
    return room


def first_fit(lengths: NDArray[np.int32], pack_len: int) -> NDArray[np.int64]:
    """Place whole samples, in the given order, each into the first pack with room for it.

    First-fit over shuffled samples leaves 0.05% of a million real lengths' room empty and draws unrelated packs in
    every epoch; decreasing order fills no better where it matters and repeats its packs.

    Args:
        lengths: ``int32[n]``, tokens per sample, each at most ``pack_len``, in the order of placement.
        pack_len: tokens that a pack holds.

    Returns:
        ``int64[n]``: the pack of each sample; packs are numbered from 0 in the order in which they were opened.
    """
    # All packs but one are more than half full, so 2 * sum / pack_len + 1 leaves are enough.
    most_packs = min(len(lengths), 2 * int(lengths.sum(dtype=np.int64)) // pack_len + 1)
    place = np.empty(len(lengths), dtype=np.int64)
    _first_fit(lengths, _tree(np.zeros(0, dtype=np.int64), most_packs), 0, pack_len, place)
    return place


def greedy_fill(lengths: NDArray[np.int32], free: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fill the room left in existing packs (HBP paper, Algorithm 2, GreedyFill).

    Args:
        lengths: ``int32[n]``, tokens per candidate, in the order in which they are tried.
        free: ``int64[packs]``, tokens of room in each pack.

    Returns:
        ``int64[n]``: the pack that takes each sample, or -1 for those that fit nowhere.
    """
    place = np.empty(len(lengths), dtype=np.int64)
    _first_fit(lengths, _tree(free, len(free)), len(free), 0, place)
    return place

"""Longest processing time first (LPT, Graham 1969) under a token cap: the heart of levelling packs by cost."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)  # type: ignore[untyped-decorator]
def _sift_down(heap: NDArray[np.int64], node: int, key: int) -> None:
    """Put ``key`` at ``node`` of a min-heap, in place of a smaller one."""
    size = len(heap)
    child = 2 * node + 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[node] = heap[child]
        node, child = child, 2 * child + 1
    heap[node] = key


@njit(cache=True)  # type: ignore[untyped-decorator]
def lpt(lengths: NDArray[np.int64], double_len: int, num_packs: int, pack_len: int, place: NDArray[np.int64]) -> bool:
    """Place each document into the pack of least cost that has room for it; the lower pack wins a tie.

    Args:
        lengths: ``int64[n]``, tokens, descending.
        double_len: the cost of a document is ``len * (len + double_len)``; 0 means attention work alone.
        num_packs: packs to fill, all empty.
        pack_len: tokens that a pack holds.
        place: ``int64[n]``, receives the pack of each document.

    Returns:
        Whether all were placed; it stops at the first document that no pack has room for.
    """
    # A key holds cost and pack number at once: cost * num_packs + pack. 2 ** 63 is far off: 4096 packs of 1M tokens need 2 ** 53.
    heap = np.arange(num_packs)
    room = np.full(num_packs, pack_len)
    for i in range(len(lengths)):
        length = lengths[i]
        node = 0
        if room[heap[0] % num_packs] < length:
            node = -1
            for other in range(1, num_packs):
                if (node < 0 or heap[other] < heap[node]) and room[heap[other] % num_packs] >= length:
                    node = other
            if node < 0:
                return False
        key = heap[node]
        pack = key % num_packs
        place[i] = pack
        room[pack] -= length
        _sift_down(heap, node, key + length * (length + double_len) * num_packs)
    return True

"""Which rows of a pack a context-parallel rank holds: integer arithmetic, testable for all ranks in one process."""

import math
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

# Shards are multiples of this many tokens over the whole pack, so that kernels see aligned shapes.
ALIGNMENT = 128


@overload
def padded_len(num_tokens: int, cp_degree: int, pack_len: int) -> int: ...


@overload
def padded_len(num_tokens: NDArray[np.int64], cp_degree: int, pack_len: int) -> NDArray[np.int64]: ...


def padded_len(num_tokens: Any, cp_degree: int, pack_len: int) -> Any:
    """Round a pack's real tokens up to a multiple of ``lcm(2 * cp_degree, 128)``, at most ``pack_len``.

    Takes one count or an array of them. An empty pack gets one unit of padding, so that its ranks run the same collectives
    as the others.
    """
    unit = math.lcm(2 * cp_degree, ALIGNMENT)
    slots = np.minimum(pack_len, np.maximum(1, -(-num_tokens // unit)) * unit)
    return slots if isinstance(num_tokens, np.ndarray) else int(slots)


def local_rows(padded: int, cp_rank: int, cp_degree: int) -> slice:
    """Give the contiguous rows of a pack that rank ``cp_rank`` of ``cp_degree`` holds.

    Ulysses attention sees whole sequences and shares heads evenly, so contiguous shards are balanced.
    """
    local_len = padded // cp_degree
    return slice(cp_rank * local_len, (cp_rank + 1) * local_len)

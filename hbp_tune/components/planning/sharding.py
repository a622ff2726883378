"""Which rows of a pack a context-parallel rank holds: integer arithmetic, testable for all ranks in one process."""

import math

# Shards are multiples of this many tokens over the whole pack, so that kernels see aligned shapes.
ALIGNMENT = 128


def padded_len(num_tokens: int, cp_degree: int, pack_len: int) -> int:
    """Round a pack's real tokens up to a multiple of ``lcm(2 * cp_degree, 128)``, at most ``pack_len``.

    An empty pack gets one unit of padding, so that its ranks run the same collectives as the others.
    """
    unit = math.lcm(2 * cp_degree, ALIGNMENT)
    return min(pack_len, max(1, -(-num_tokens // unit)) * unit)


def local_rows(padded: int, cp_rank: int, cp_degree: int) -> slice:
    """Give the contiguous rows of a pack that rank ``cp_rank`` of ``cp_degree`` holds.

    Ulysses attention sees whole sequences and shares heads evenly, so contiguous shards are balanced.
    """
    local_len = padded // cp_degree
    return slice(cp_rank * local_len, (cp_rank + 1) * local_len)

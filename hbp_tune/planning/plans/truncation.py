"""What stays of a sample that is longer than every group: its targets, wherever the rest can give way."""

import numpy as np
from numpy.typing import NDArray

# How a sample is cut, as the planner's policies name it.
CUTS = ("truncate_middle", "truncate_start", "truncate_end")
# Tokens that stay at each end of what is cut: they hold turns together, such as a header, or the question behind a document.
_KEPT = 16


def cut_of(overlong: str) -> str:
    """Give the way in which a planner's policy cuts samples; the usual one where it says no more than ``truncate``."""
    return overlong if overlong in CUTS else CUTS[0]


def kept_tokens(is_target: NDArray[np.bool_], max_len: int, cut: str) -> NDArray[np.int64]:
    """Choose the tokens of a sample that stay.

    ``truncate_middle`` takes tokens that are not targets, from the middle of their longest run (a document in the prompt, as a
    rule), then from the middle of the next. ``truncate_start`` takes the beginning of the prompt, behind its first token.
    Both leave 16 tokens at each end of what they cut, and take what is still too much from the sample's end, as
    ``truncate_end`` does from the start: then the answer itself is too long.

    Args:
        is_target: ``bool[num_tokens]``.
        max_len: how many stay, less than ``num_tokens``.
        cut: one of `CUTS`.

    Returns:
        ``int64[max_len]``, ascending.
    """
    stays = np.ones(len(is_target), dtype=np.bool_)
    excess = len(is_target) - max_len
    if cut == "truncate_middle":
        for start, stop in _runs_by_length(~is_target):
            taken = min(excess, max(0, stop - start - 2 * _KEPT))
            first = start + (stop - start - taken + 1) // 2
            stays[first : first + taken] = False
            excess -= taken
    elif cut == "truncate_start":
        prompt = int(np.argmax(is_target)) if is_target.any() else len(is_target)
        taken = min(excess, max(0, prompt - 1 - _KEPT))
        stays[1 : 1 + taken] = False
    return np.flatnonzero(stays)[:max_len]


def _runs_by_length(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Give where the runs of a mask start and stop, the longest first, of equal ones the first."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return sorted(runs, key=lambda run: run[0] - run[1])

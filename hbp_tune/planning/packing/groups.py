"""Which group a sample belongs to, and what happens to samples that fit none."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.truncation import CUTS

OVERLONG_POLICIES = ("error", "drop", "truncate", *CUTS)


def group_of_lengths(lengths: NDArray[np.int32], groups: Sequence[PackingGroup]) -> NDArray[np.int16]:
    """Assign each sample to the shortest group that holds it (HBP paper, Algorithm 2, GroupData).

    Returns:
        ``int16[num_samples]``, index into ``groups``; ``len(groups)`` where a sample is longer than the longest group.
    """
    pack_lens = np.array([group.pack_len for group in groups])
    return np.searchsorted(pack_lens, lengths, side="left").astype(np.int16)


def check_overlong_policy(overlong: str) -> None:
    """Refuse anything but the policies.

    Raises:
        ConfigError: ``overlong`` is none of error, drop, truncate and the ways to cut.
    """
    if overlong not in OVERLONG_POLICIES:
        raise ConfigError(f"overlong={overlong!r} must be one of {', '.join(OVERLONG_POLICIES)}")


def describe_overlong(overlong_ids: NDArray[np.int32], lengths: NDArray[np.int32], longest: PackingGroup) -> str:
    """Say in one line how many samples exceed the longest group, how long they get, and which rows come first."""
    overlong_ids = np.unique(overlong_ids)
    first = ", ".join(str(i) for i in overlong_ids[:5])
    return (
        f"{len(overlong_ids)} of {len(lengths)} samples are longer than pack_len={longest.pack_len} of the longest group "
        f"{longest.name!r}: the longest has {int(lengths[overlong_ids].max())} tokens; first rows: {first}"
    )


def check_lengths(
    lengths: NDArray[np.int32], overlong: str, groups: Sequence[PackingGroup], sample_ids: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Check the lengths of the drawn samples and find those that no group holds.

    Args:
        lengths: ``int32[num_samples]``, of all samples.
        overlong: policy.
        groups: from short to long.
        sample_ids: ``int32[num_drawn]``.

    Returns:
        Ids of the samples longer than the longest group, ascending, as often as they were drawn, ``int32[...]``.

    Raises:
        PackingError: there is no sample, a length is below 1, every sample is too long, or one is and ``overlong`` is error.
    """
    longest = groups[-1]
    if len(sample_ids) == 0:
        raise PackingError("the data set is empty: there is no sample to plan; check the data files and filters")
    drawn = lengths[sample_ids]
    if drawn[shortest := int(np.argmin(drawn))] < 1:
        raise PackingError(f"sample {sample_ids[shortest]} has {drawn[shortest]} tokens, at least 1 is needed; remove the row")
    overlong_ids = np.sort(sample_ids[drawn > longest.pack_len])
    if len(overlong_ids) and overlong == "error":
        first = int(overlong_ids[0])
        raise PackingError(
            f"sample {first} has {lengths[first]} tokens, group {longest.name!r} holds {longest.pack_len}. "
            f"{describe_overlong(overlong_ids, lengths, longest)}. Add a longer group, or set planner.overlong=drop "
            f"or planner.overlong=truncate"
        )
    if len(overlong_ids) == len(sample_ids) and overlong == "drop":
        raise PackingError(
            f"overlong=drop leaves no sample: {describe_overlong(overlong_ids, lengths, longest)}. "
            f"Add a longer group or set planner.overlong=truncate"
        )
    return overlong_ids

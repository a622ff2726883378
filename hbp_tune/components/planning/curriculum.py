"""The order of an epoch's steps: stateless functions that permute steps, never make or drop one."""

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.records import PackingGroup


class Curriculum(Protocol):
    """Orders the steps of an epoch."""

    def order(self, step_groups: NDArray[np.int16], *, groups: Sequence[PackingGroup], first_step: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained.

        Args:
            step_groups: ``int16[num_steps]``, the group of each step; steps of one group are already shuffled.
            groups: what the indices in ``step_groups`` mean.
            first_step: optimizer steps of the run before this epoch.

        Returns:
            ``int64[num_steps]``, a permutation: the step to train at each position.
        """
        ...


class Interleave:
    """Alternates between groups, each spread evenly over the epoch in proportion to its number of steps."""

    def order(self, step_groups: NDArray[np.int16], *, groups: Sequence[PackingGroup], first_step: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`."""
        position = np.empty(len(step_groups))
        for group in np.unique(step_groups):
            members = np.flatnonzero(step_groups == group)
            position[members] = (np.arange(len(members)) + 0.5) / len(members)
        return np.lexsort((step_groups, position))


class ShortFirst:
    """Starts the run with short packs, then alternates between all groups (HBP paper, section 3.3).

    Args:
        steps: optimizer steps, counted over the whole run, that draw from short groups only.
        max_pack_len: groups up to this pack length are short; by default the shortest group alone.

    Raises:
        ConfigError: ``steps`` is negative.
    """

    def __init__(self, steps: int, max_pack_len: int | None = None) -> None:
        if steps < 0:
            raise ConfigError(f"curriculum.steps={steps} must be 0 or more")
        self.steps = steps
        self.max_pack_len = max_pack_len

    def order(self, step_groups: NDArray[np.int16], *, groups: Sequence[PackingGroup], first_step: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`.

        Raises:
            ConfigError: no group is as short as ``max_pack_len``.
        """
        limit = groups[0].pack_len if self.max_pack_len is None else self.max_pack_len
        is_short = np.array([group.pack_len <= limit for group in groups])
        if not is_short.any():
            raise ConfigError(
                f"curriculum.max_pack_len={limit} is shorter than every group; the shortest has pack_len={groups[0].pack_len}"
            )
        wanted = max(0, self.steps - first_step)
        short_steps = np.flatnonzero(is_short[step_groups])
        if len(short_steps) < min(wanted, len(step_groups)):
            warnings.warn(
                f"curriculum.steps={self.steps} asks for {wanted} short steps in this epoch, which has {len(short_steps)}; "
                f"longer groups follow after these",
                stacklevel=2,
            )
        # Among the short groups, too, the first steps are an even mixture.
        mixed = short_steps[Interleave().order(step_groups[short_steps], groups=groups, first_step=first_step)]
        first = mixed[:wanted]
        rest = np.setdiff1d(np.arange(len(step_groups)), first)
        return np.concatenate((first, rest[Interleave().order(step_groups[rest], groups=groups, first_step=first_step)]))

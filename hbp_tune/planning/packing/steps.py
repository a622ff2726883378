"""Steps of the groups to the plan of an epoch: what a curriculum sees of them, and their assembly in its order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.packing.curriculum import StepProfile
from hbp_tune.planning.plans.packs import Packs
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup


@dataclass(frozen=True, slots=True, eq=False)
class GroupSteps:
    """Optimizer steps of one group, before groups are mixed.

    Args:
        group: index into the groups.
        packs: micro-step after micro-step, one pack per replica; their ids count the drawn samples.
        step_of_slice: ``int64[micro-steps]``, the step of each micro-step, counted from 0 without gaps.
    """

    group: int
    packs: Packs
    step_of_slice: NDArray[np.int64]

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return int(self.step_of_slice.max()) + 1


def profile_steps(parts: Sequence[GroupSteps], lengths: NDArray[np.int32], groups: Sequence[PackingGroup]) -> StepProfile:
    """Give what a curriculum knows of the steps of all groups, counted through the parts.

    Args:
        parts: of the groups.
        lengths: ``int32[num_drawn]``, as planned.
        groups: of the run.
    """
    longest = []
    for part in parts:
        num_replicas = len(part.packs) // len(part.step_of_slice)
        step_of_sample = np.repeat(np.repeat(part.step_of_slice, num_replicas), np.diff(part.packs.offsets))
        of_step = np.zeros(part.num_steps, dtype=np.int32)
        np.maximum.at(of_step, step_of_sample, lengths[part.packs.ids])
        longest.append(of_step)
    pack_lens = [groups[part.group].pack_len for part in parts]
    return StepProfile(np.repeat(pack_lens, [part.num_steps for part in parts]), np.concatenate(longest))


def assemble(
    parts: Sequence[GroupSteps],
    order: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    sample_ids: NDArray[np.int32],
    groups: Sequence[PackingGroup],
    world_size: int,
    dropped: NDArray[np.int32],
    truncated: NDArray[np.int32],
    cut: str,
) -> EpochPlan:
    """Put the steps of all groups in order, as compressed rows.

    Args:
        parts: of the groups.
        order: ``int64[num_steps]``, which step, counted through all parts, is trained at each position.
        lengths: ``int32[num_drawn]``, as planned.
        sample_ids: ``int32[num_drawn]``, which sample of the data each is.
        groups: of the run.
        world_size: ranks of the run.
        dropped: see `EpochPlan`.
        truncated: see `EpochPlan`.
        cut: see `EpochPlan`.
    """
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    steps, micro_steps, group_of_pack, first_ranks, first_step = [], [], [], [], 0
    for part in parts:
        num_replicas = world_size // groups[part.group].cp_degree
        # Slices are stably sorted by step; the rank inside its step is the micro-step.
        by_step = np.argsort(part.step_of_slice, kind="stable")
        counts = np.bincount(part.step_of_slice)
        micro_step = np.empty_like(by_step)
        micro_step[by_step] = np.arange(len(by_step)) - np.repeat(np.cumsum(counts) - counts, counts)
        steps.append(np.repeat(position[first_step + part.step_of_slice], num_replicas))
        micro_steps.append(np.repeat(micro_step, num_replicas))
        group_of_pack.append(np.full(len(part.packs), part.group))
        first_ranks.append(np.tile(np.arange(num_replicas) * groups[part.group].cp_degree, len(by_step)))
        first_step += part.num_steps
    step, micro_step, first_rank = np.concatenate(steps), np.concatenate(micro_steps), np.concatenate(first_ranks)
    by_time = np.lexsort((first_rank, micro_step, step))
    packs = Packs.joined([part.packs for part in parts]).take(by_time)
    return EpochPlan(
        groups=tuple(groups),
        world_size=world_size,
        sample_ids=sample_ids[packs.ids],
        lengths=lengths[packs.ids],
        pack_offsets=packs.offsets,
        pack_group=np.concatenate(group_of_pack)[by_time].astype(np.int16),
        pack_step=step[by_time].astype(np.int32),
        pack_micro_step=micro_step[by_time].astype(np.int16),
        pack_first_rank=first_rank[by_time].astype(np.int32),
        dropped=dropped,
        truncated=truncated,
        cut=cut,
    )

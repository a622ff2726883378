"""`BalancePlanner`: lengths and groups to the plan of an epoch, in the order of the paper's Algorithm 2."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.balancing import Pack, deal_micro_steps, sort_by_attention, spread_tail
from hbp_tune.components.planning.curriculum import Curriculum, Interleave
from hbp_tune.components.planning.errors import ConfigError, PackingError
from hbp_tune.components.planning.groups import check_lengths, check_overlong_policy, group_of_lengths
from hbp_tune.components.planning.hashing import hashed_order
from hbp_tune.components.planning.packing import first_fit, greedy_fill
from hbp_tune.components.planning.records import EpochPlan, PackingGroup, check_groups


class BalancePlanner:
    """Plans an epoch by hierarchical balance packing (HBP paper, Algorithm 2).

    Group by length, pack each group by first-fit over shuffled samples, fill the room left in long packs with shorter
    samples, sort packs by attention work, cut them into micro-steps of equal work, order the steps by the curriculum.
    The plan is a function of its arguments alone, the same on every machine.

    Args:
        tokens_per_step: wanted tokens of an optimizer step over all ranks; each group accumulates as many micro-steps
            as come closest. By default every group takes one micro-step per optimizer step.
        overlong: what to do with samples longer than the longest group: ``error``, ``drop`` or ``truncate``.
        fill: fill long packs with shorter samples (GreedyFill).
        balance: sort packs by attention work before they are cut into micro-steps.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, tokens_per_step: int | None = None, overlong: str = "error", *, fill: bool = True, balance: bool = True
    ) -> None:
        check_overlong_policy(overlong)
        if tokens_per_step is not None and tokens_per_step < 1:
            raise ConfigError(f"planner.tokens_per_step={tokens_per_step} must be at least 1, or null for one micro-step")
        self.tokens_per_step = tokens_per_step
        self.overlong = overlong
        self.fill = fill
        self.balance = balance

    def plan(
        self,
        lengths: NDArray[np.int32],
        num_targets: NDArray[np.int32],
        groups: Sequence[PackingGroup],
        *,
        world_size: int,
        seed: int,
        epoch: int = 0,
        curriculum: Curriculum | None = None,
        first_step: int = 0,
    ) -> EpochPlan:
        """Plan one epoch.

        Args:
            lengths: ``int32[num_samples]``, tokens per sample; the position is the sample id.
            num_targets: ``int32[num_samples]``, labels of each sample that count toward the loss, at its planned length.
            groups: from short to long.
            world_size: ranks of the run.
            seed: with ``epoch`` decides every shuffle.
            epoch: gives other packs in each epoch.
            curriculum: orders the steps; by default the groups alternate in proportion (`Interleave`).
            first_step: optimizer steps of the run before this epoch.

        Returns:
            A plan that holds every sample exactly once, but for those in ``dropped``. Groups that do not fit together or
            the world size are a `ConfigError`; no sample, a length below 1, an overlong sample under ``overlong=error``
            and a step without target are a `PackingError`.
        """
        check_groups(groups, world_size)
        overlong_ids = check_lengths(lengths, self.overlong, groups)
        lengths = np.minimum(lengths, groups[-1].pack_len).astype(np.int32)
        shuffled = hashed_order(len(lengths), seed=seed, epoch=epoch, stream="samples")
        if self.overlong == "drop":
            shuffled = shuffled[~np.isin(shuffled, overlong_ids)]

        micro_steps: list[list[list[Pack]]] = []  # per step, in the groups' order: micro-steps of one pack per replica
        step_groups: list[int] = []
        for index, packs in enumerate(self._pack_groups(shuffled, lengths, groups)):
            steps = self._steps_of_group(packs, lengths, groups[index], world_size)
            order = hashed_order(len(steps), seed=seed, epoch=epoch, stream=f"steps of {groups[index].name}")
            micro_steps += [steps[i] for i in order]
            step_groups += [index] * len(steps)
        order = (curriculum or Interleave()).order(np.array(step_groups, dtype=np.int16), groups=groups, first_step=first_step)
        no_ids = np.empty(0, dtype=np.int32)
        plan = _assemble(
            [(step_groups[i], micro_steps[i]) for i in order],
            lengths,
            groups=groups,
            world_size=world_size,
            dropped=overlong_ids.astype(np.int32) if self.overlong == "drop" else no_ids,
            truncated=overlong_ids.astype(np.int32) if self.overlong == "truncate" else no_ids,
        )
        _check_targets(plan, num_targets)
        return plan

    def accumulation(self, group: PackingGroup, world_size: int) -> int:
        """Give the micro-steps per optimizer step of a group: what comes closest to ``tokens_per_step``, at least 1."""
        if self.tokens_per_step is None:
            return 1
        tokens_per_micro_step = world_size // group.cp_degree * group.pack_len
        if tokens_per_micro_step > 1.1 * self.tokens_per_step:
            warnings.warn(
                f"one micro-step of group {group.name!r} holds {tokens_per_micro_step} tokens, more than "
                f"tokens_per_step={self.tokens_per_step}; its optimizer steps are larger than asked",
                stacklevel=2,
            )
        return max(1, int(self.tokens_per_step / tokens_per_micro_step + 0.5))

    def _pack_groups(
        self, shuffled: NDArray[np.int64], lengths: NDArray[np.int32], groups: Sequence[PackingGroup]
    ) -> list[list[Pack]]:
        """Pack from the longest group down; the room left takes samples of the next shorter groups."""
        group_of = group_of_lengths(lengths, groups)[shuffled]
        waiting = [shuffled[group_of == index] for index in range(len(groups))]
        packs: list[list[Pack]] = [[] for _ in groups]
        for index in reversed(range(len(groups))):
            ids = waiting[index]
            if not len(ids):
                continue
            place = first_fit(lengths[ids], groups[index].pack_len)
            free = groups[index].pack_len - np.bincount(place, weights=lengths[ids]).astype(np.int64)
            for shorter in reversed(range(index if self.fill else 0)):
                taken = greedy_fill(lengths[waiting[shorter]], free)
                filled = waiting[shorter][taken >= 0]
                free -= np.bincount(taken[taken >= 0], weights=lengths[filled], minlength=len(free)).astype(np.int64)
                ids, place = np.concatenate((ids, filled)), np.concatenate((place, taken[taken >= 0]))
                waiting[shorter] = waiting[shorter][taken < 0]
            by_pack = np.argsort(place, kind="stable")
            packs[index] = np.split(ids[by_pack], np.cumsum(np.bincount(place))[:-1])
        return packs

    def _steps_of_group(
        self, packs: list[Pack], lengths: NDArray[np.int32], group: PackingGroup, world_size: int
    ) -> list[list[list[Pack]]]:
        """Cut a group's packs into optimizer steps of micro-steps of one pack per replica."""
        if not packs:
            return []
        num_replicas = world_size // group.cp_degree
        if self.balance:
            packs = sort_by_attention(packs, lengths)
        packs = spread_tail(packs, lengths, num_replicas=num_replicas, pack_len=group.pack_len)
        slices = [packs[i : i + num_replicas] for i in range(0, len(packs), num_replicas)]
        step_of = deal_micro_steps(len(slices), self.accumulation(group, world_size))
        steps: list[list[list[Pack]]] = [[] for _ in range(int(step_of.max()) + 1)]
        for step, micro_step in zip(step_of, slices, strict=True):
            steps[step].append(micro_step)
        return steps


def compare_with_naive(
    planner: BalancePlanner, lengths: NDArray[np.int32], groups: Sequence[PackingGroup], *, world_size: int, seed: int
) -> dict[str, EpochPlan]:
    """Plan the same data by ``planner`` and by naive packing: every sample in the longest group, no balancing.

    Where one long pack takes all ranks there is a single replica, which is balanced by definition; so the comparison on
    four times as many ranks stands beside it.

    Returns:
        Plans by a name for people.
    """
    naive = BalancePlanner(planner.tokens_per_step, planner.overlong, fill=False, balance=False)
    plans = {}
    for ranks in (world_size,) if world_size > groups[-1].cp_degree else (world_size, 4 * world_size):
        where = "" if ranks == world_size else f" on {ranks} ranks"
        for name, by, of in ((f"HBP{where}", planner, groups), (f"one length{where}", naive, groups[-1:])):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said once, about the plan that is trained
                # These plans are not trained, so targets play no part: every sample counts as having one.
                plans[name] = by.plan(lengths, np.ones_like(lengths), of, world_size=ranks, seed=seed)
    return plans


def _assemble(
    steps: list[tuple[int, list[list[Pack]]]],
    lengths: NDArray[np.int32],
    *,
    groups: Sequence[PackingGroup],
    world_size: int,
    dropped: NDArray[np.int32],
    truncated: NDArray[np.int32],
) -> EpochPlan:
    """Flatten the ordered steps into compressed rows."""
    packs: list[Pack] = []
    rows: list[tuple[int, int, int, int]] = []
    for step, (group, micro_steps) in enumerate(steps):
        for micro_step, replicas in enumerate(micro_steps):
            packs += replicas
            cp_degree = groups[group].cp_degree
            rows += [(group, step, micro_step, replica * cp_degree) for replica in range(len(replicas))]
    sample_ids = np.concatenate(packs)
    group, step, micro_step, first_rank = np.array(rows).T
    return EpochPlan(
        groups=tuple(groups),
        world_size=world_size,
        sample_ids=sample_ids.astype(np.int32),
        lengths=lengths[sample_ids].astype(np.int32),
        pack_offsets=np.concatenate(([0], np.cumsum([len(pack) for pack in packs]))).astype(np.int64),
        pack_group=group.astype(np.int16),
        pack_step=step.astype(np.int32),
        pack_micro_step=micro_step.astype(np.int16),
        pack_first_rank=first_rank.astype(np.int32),
        dropped=dropped,
        truncated=truncated,
    )


def _check_targets(plan: EpochPlan, num_targets: NDArray[np.int32]) -> None:
    """Refuse a step that would divide by zero targets.

    Raises:
        PackingError: a step whose samples have no label that counts toward the loss.
    """
    step_targets = targets_per_step(plan, num_targets)
    if step_targets.all():
        return
    step = int(np.argmin(step_targets))
    ids = plan.sample_ids[plan.pack_step[plan.pack_of_sample] == step]
    raise PackingError(
        f"step {step} has no target: none of its samples {ids[:5].tolist()}{' ...' if len(ids) > 5 else ''} has an assistant "
        f"turn that counts toward the loss; remove these rows, train on the input too, or raise planner.tokens_per_step"
    )


def targets_per_step(plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count the labels that count toward the loss in each optimizer step, over all ranks, ``int64[num_steps]``."""
    per_pack = plan.sum_per_pack(num_targets[plan.sample_ids])
    return np.bincount(plan.pack_step, weights=per_pack, minlength=plan.num_steps).astype(np.int64)

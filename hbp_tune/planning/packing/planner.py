"""`BalancePlanner`: lengths and groups to the plan of an epoch."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError, PackingError
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.balancing import SORTS, deal_micro_steps, spread_tail, work_by
from hbp_tune.planning.packing.curriculum import Curriculum, Interleave
from hbp_tune.planning.packing.first_fit import FirstFit, Packer, greedy_fill
from hbp_tune.planning.packing.groups import check_lengths, check_overlong_policy, describe_overlong, group_of_lengths
from hbp_tune.planning.packing.leveling import cost_limit, fill_level, group_by_cost, level_heavy, level_windows
from hbp_tune.planning.packing.steps import GroupSteps, assemble, profile_steps
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.packs import Packs
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup, check_groups
from hbp_tune.planning.plans.truncation import CUTS, cut_of

MODES = ("cost", "paper")

# A micro-step may hold so many times ``tokens_per_step`` before it is said.
STEP_TOLERANCE = 1.1


class BalancePlanner:
    """Plans an epoch by hierarchical balance packing, in one of two modes.

    *cost* (for varlen kernels, where packs of unequal token counts cost nothing): groups take samples by modelled cost;
    random windows of short samples are dealt to packs of equal cost, long samples are put beside their like and filled up
    to a common cost. *paper* (HBP paper, Algorithm 2): groups take samples by length; packs are filled by a packer, the
    room left in long ones with shorter samples (GreedyFill); packs sorted by attention work are cut into micro-steps.
    Whole numbers decide, so that a plan is a function of its arguments alone, the same on every machine.

    Args:
        tokens_per_step: wanted tokens of an optimizer step over all ranks; each group accumulates as many micro-steps
            as come closest. By default every group takes one micro-step per optimizer step.
        overlong: what to do with samples longer than the longest group: ``error``, ``drop``, or cut them, by
            ``truncate_middle`` (also ``truncate``), ``truncate_start`` or ``truncate_end``; see `kept_tokens`. Samples of which
            no target is left are dropped.
        mode: ``cost`` or ``paper``.
        packer: of paper mode: how samples are placed into packs; first-fit over a shuffle by default.
        fill: of paper mode: fill long packs with shorter samples (GreedyFill).
        sort_by: of paper mode: what neighbouring packs have in common: ``attention``, ``cost``, ``tokens``, or null for
            a random order.

    Raises:
        ConfigError: an argument is out of range, or belongs to the other mode.
    """

    def __init__(
        self,
        tokens_per_step: int | None = None,
        overlong: str = "error",
        *,
        mode: str = "cost",
        packer: Packer | None = None,
        fill: bool = True,
        sort_by: str | None = "attention",
    ) -> None:
        check_overlong_policy(overlong)
        if tokens_per_step is not None and tokens_per_step < 1:
            raise ConfigError(f"planner.tokens_per_step={tokens_per_step} must be at least 1, or null for one micro-step")
        if mode not in MODES:
            raise ConfigError(f"planner.mode={mode!r} must be one of {', '.join(MODES)}")
        if sort_by not in SORTS:
            raise ConfigError(f"planner.sort_by={sort_by!r} must be attention, cost, tokens or null")
        if mode == "cost" and (packer is not None or not fill or sort_by != "attention"):
            raise ConfigError("planner.packer, fill and sort_by belong to planner.mode=paper; set that, or leave them out")
        self.tokens_per_step = tokens_per_step
        self.overlong = overlong
        self.mode = mode
        self.packer = packer or FirstFit()
        self.fill = fill
        self.sort_by = sort_by

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
        epochs: int = 1,
        max_steps: int | None = None,
        cost: CostModel | None = None,
        sample_ids: NDArray[np.int32] | None = None,
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
            epochs: of the run, and
            max_steps: optimizer steps after which it ends: for curricula that last a share of the run.
            cost: of the model that is trained; Llama 3.1 8B by default.
            sample_ids: ``int32[num_drawn]``, the samples of this epoch, some perhaps more than once (`draw_samples`); by
                default every sample once.

        Returns:
            A plan that holds every drawn sample as often as it was drawn, but for those in ``dropped``. Groups that do not
            fit together or the world size are a `ConfigError`; no sample, a length below 1, an overlong sample under
            ``overlong=error`` and a step without target are a `PackingError`.

        Raises:
            PackingError: no sample is left, as no target of those that are cut fits.
        """
        check_groups(groups, world_size)
        if sample_ids is None:
            sample_ids = np.arange(len(lengths), dtype=np.int32)
        overlong_ids = check_lengths(lengths, self.overlong, groups, sample_ids)
        # Packs are made of positions in the draw, since a sample may have been drawn more than once.
        all_lengths, lengths = lengths, lengths[sample_ids]
        shuffled = hashed_order(len(lengths), seed=seed, epoch=epoch, stream="samples").astype(np.int32)
        is_cut = self.overlong not in ("error", "drop")
        has_target = num_targets[overlong_ids] > 0
        dropped, truncated = (overlong_ids[~has_target], overlong_ids[has_target]) if is_cut else (overlong_ids, overlong_ids[:0])
        if len(dropped):
            stays = lengths <= groups[-1].pack_len
            stays |= is_cut & (num_targets[sample_ids] > 0)
            shuffled = shuffled[stays[shuffled]]
            if not len(shuffled):
                way_out = ", or set planner.overlong=truncate_middle" if cut_of(self.overlong) != CUTS[0] else ""
                raise PackingError(
                    f"overlong={self.overlong} leaves no sample: {describe_overlong(dropped, all_lengths, groups[-1])}, and no "
                    f"target of theirs fits. Add a longer group{way_out}"
                )
        lengths = np.minimum(lengths, groups[-1].pack_len).astype(np.int32)
        cost = cost or CostModel()
        if self.mode == "cost":
            parts = self._level(shuffled, lengths, groups, world_size, cost)
        else:
            parts = self._pack_and_sort(shuffled, lengths, groups, world_size, cost, seed=seed, epoch=epoch)

        # Steps of one group come in random order; which group comes when is the curriculum's.
        steps = profile_steps(parts, lengths, groups)
        random_rank = np.argsort(hashed_order(len(steps), seed=seed, epoch=epoch, stream="steps"))
        shuffle = np.lexsort((random_rank, steps.pack_lens))
        run_steps = min(epochs * len(steps), max_steps or epochs * len(steps))
        profile = replace(steps.take(shuffle), run_steps=run_steps)
        order = (curriculum or Interleave()).order(profile, first_step=first_step, epoch=epoch, seed=seed)
        plan = assemble(
            parts,
            shuffle[order],
            lengths,
            sample_ids=sample_ids,
            groups=groups,
            world_size=world_size,
            dropped=dropped,
            truncated=truncated,
            cut=cut_of(self.overlong),
        )
        check_targets(plan, num_targets)
        return plan

    def accumulation(self, group: PackingGroup, world_size: int) -> int:
        """Give the micro-steps per optimizer step of a group: what comes closest to ``tokens_per_step``, at least 1."""
        if self.tokens_per_step is None:
            return 1
        tokens_per_micro_step = world_size // group.cp_degree * group.pack_len
        if tokens_per_micro_step > STEP_TOLERANCE * self.tokens_per_step:
            warnings.warn(
                f"one micro-step of group {group.name!r} holds {tokens_per_micro_step} tokens, more than "
                f"tokens_per_step={self.tokens_per_step}; its optimizer steps are larger than asked",
                stacklevel=2,
            )
        return max(1, int(self.tokens_per_step / tokens_per_micro_step + 0.5))

    def _level(
        self,
        shuffled: NDArray[np.int32],
        lengths: NDArray[np.int32],
        groups: Sequence[PackingGroup],
        world_size: int,
        cost: CostModel,
    ) -> list[GroupSteps]:
        """Cost mode: the longest samples first, filled up with shorter ones; windows of what is left of the shortest group."""
        group_of = group_by_cost(lengths[shuffled], groups, cost, world_size)
        heavy = [shuffled[group_of == index] for index in range(len(groups))]
        own = lengths[heavy[0]]
        is_light = own <= cost_limit(own, groups[0].pack_len, cost, world_size // groups[0].cp_degree)
        light, heavy[0] = heavy[0][is_light], heavy[0][~is_light]
        parts = []
        for index in reversed(range(len(groups))):
            group, replicas = groups[index], world_size // groups[index].cp_degree
            shape = {"pack_len": group.pack_len, "num_replicas": replicas}
            packs = Packs.joined([])
            if len(heavy[index]):
                packs = level_heavy(heavy[index], lengths, cost, **shape)
                for shorter in reversed(range(1, index)):
                    packs, heavy[shorter] = fill_level(packs, heavy[shorter], lengths, cost, **shape)
                packs, light = fill_level(packs, light, lengths, cost, **shape)
            if index == 0 and len(light):
                accumulation, slices = self.accumulation(group, world_size), len(packs) // replicas
                windows, step_of_slice = level_windows(
                    light, lengths, cost, **shape, accumulation=accumulation, heavy_slices=slices
                )
                packs = Packs.joined([packs, windows])
            elif len(packs):
                step_of_slice = deal_micro_steps(len(packs) // replicas, self.accumulation(group, world_size))
            else:
                continue
            parts.append(GroupSteps(index, packs, np.unique(step_of_slice, return_inverse=True)[1]))
        return parts[::-1]

    def _pack_and_sort(
        self,
        shuffled: NDArray[np.int32],
        lengths: NDArray[np.int32],
        groups: Sequence[PackingGroup],
        world_size: int,
        cost: CostModel,
        *,
        seed: int,
        epoch: int,
    ) -> list[GroupSteps]:
        """Paper mode: pack from the longest group down; the room left takes samples of the next shorter groups.

        Raises:
            PackingError: the packer breaks its contract.
        """
        group_of = group_of_lengths(lengths[shuffled], groups)
        waiting = [shuffled[group_of == index] for index in range(len(groups))]
        parts = []
        for index in reversed(range(len(groups))):
            if not len(waiting[index]):
                continue
            group = groups[index]
            ids = np.sort(waiting[index])  # the data set's order, which some packers keep
            place = self.packer.place(lengths[ids], group.pack_len, seed=seed, epoch=epoch)
            free = group.pack_len - np.bincount(place, weights=lengths[ids]).astype(np.int64)
            if free.min() < 0 or free.max() == group.pack_len:
                fault = "overfills" if free.min() < 0 else "leaves empty"
                raise PackingError(
                    f"{type(self.packer).__name__} {fault} a pack of group {group.name!r}: a pack holds "
                    f"pack_len={group.pack_len} tokens, and packs are numbered from 0 without gaps; mend its place()"
                )
            for shorter in reversed(range(index if self.fill else 0)):
                taken = greedy_fill(lengths[waiting[shorter]], free)
                filled, into = waiting[shorter][taken >= 0], taken[taken >= 0]
                free -= np.bincount(into, weights=lengths[filled], minlength=len(free)).astype(np.int64)
                ids, place = np.concatenate((ids, filled)), np.concatenate((place, into))
                waiting[shorter] = waiting[shorter][taken < 0]
            packs = Packs.from_places(ids, place, len(free))
            order = hashed_order(len(packs), seed=seed, epoch=epoch, stream="packs")
            if self.sort_by:
                order = np.argsort(packs.sums(work_by(self.sort_by, lengths, cost)), kind="stable")
            num_replicas = world_size // group.cp_degree
            packs = spread_tail(packs.take(order), lengths, num_replicas=num_replicas, pack_len=group.pack_len)
            step_of_slice = deal_micro_steps(len(packs) // num_replicas, self.accumulation(group, world_size))
            parts.append(GroupSteps(index, packs, step_of_slice))
        return parts[::-1]


def check_targets(plan: EpochPlan, num_targets: NDArray[np.int32]) -> None:
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

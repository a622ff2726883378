"""The two records that every package reads: `PackingGroup` and `EpochPlan`."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.packs import sum_rows
from hbp_tune.planning.plans.truncation import CUTS

AC_MODES = ("full", "selective", "offload")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingGroup:
    """Samples that share a pack length and the parallel settings that suit it (HBP paper, section 3.1).

    Args:
        name: shown in the plan, the progress bar and the metrics.
        pack_len: tokens of one pack over all its context-parallel ranks.
        cp_degree: ranks that share one pack; 1 means no context parallelism.
        ac_layers: how many of the first layers recompute their activations in the backward.
        ac_mode: how they do so. ``full`` runs the whole layer again; ``selective`` keeps what attention and context-parallel
            communication gave, so that these run once; ``offload`` runs the whole layer again, and keeps its input in host
            memory until then.

    Raises:
        ConfigError: a value is out of range, or ``pack_len`` is not a multiple of ``2 * cp_degree``.
    """

    name: str
    pack_len: int
    cp_degree: int = 1
    ac_layers: int = 0
    ac_mode: str = "full"

    def __post_init__(self) -> None:
        for field, least in (("pack_len", 2), ("cp_degree", 1), ("ac_layers", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"group {self.name!r}: {field}={value!r} must be a whole number of at least {least}")
        # Two chunks per cp rank: every scheme can share a pack out evenly, those that pair a head with a tail chunk too.
        if self.pack_len % (2 * self.cp_degree):
            raise ConfigError(
                f"group {self.name!r}: pack_len={self.pack_len} must be a multiple of "
                f"2 * cp_degree={2 * self.cp_degree}; round it up or lower cp_degree"
            )
        if self.ac_mode not in AC_MODES:
            raise ConfigError(
                f"group {self.name!r}: ac_mode={self.ac_mode!r} must be one of {', '.join(AC_MODES)}; ac_layers=0 turns it off"
            )

    def describe_ac(self) -> str:
        """Name the recomputed layers for people, and the mode where it is not the usual one: ``28``, ``28 selective``."""
        return str(self.ac_layers) if self.ac_mode == "full" or not self.ac_layers else f"{self.ac_layers} {self.ac_mode}"


def check_groups(groups: Sequence[PackingGroup], world_size: int) -> None:
    """Check what holds between groups, and between the groups and the number of ranks.

    Raises:
        ConfigError: no group, equal names, pack lengths that do not grow, or a CP degree that does not divide the world.
    """
    if not groups:
        raise ConfigError("groups is empty; give at least one PackingGroup(name, pack_len)")
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ConfigError(f"groups {names} must have different names")
    for shorter, longer in itertools.pairwise(groups):
        if shorter.pack_len >= longer.pack_len:
            raise ConfigError(
                f"group {longer.name!r} has pack_len={longer.pack_len}, not more than {shorter.pack_len} of "
                f"{shorter.name!r} before it; list the groups from short to long"
            )
    for group in groups:
        if world_size % group.cp_degree:
            raise ConfigError(
                f"world size {world_size} is not a multiple of cp_degree={group.cp_degree} of group {group.name!r}; "
                f"start a multiple of {group.cp_degree} ranks or set cp_degree to a divisor of {world_size}"
            )


def check_ac_layers(groups: Sequence[PackingGroup], num_layers: int) -> None:
    """Check the groups' recomputed layers against the model's layers.

    Raises:
        ConfigError: a group recomputes more layers than there are.
    """
    for group in groups:
        if group.ac_layers > num_layers:
            raise ConfigError(
                f"group {group.name!r}: ac_layers={group.ac_layers} is more than the model's {num_layers} layers; "
                f"set {num_layers} to recompute all of them"
            )


def check_positions(plan: "EpochPlan", max_seq_len: int) -> None:
    """Check the plan's longest document against the positions that the model encodes.

    Raises:
        ConfigError: it is longer.
    """
    if (longest := int(plan.lengths.max())) > max_seq_len:
        raise ConfigError(
            f"the longest sample that is trained has {longest} tokens, the model encodes {max_seq_len} positions "
            f"(max_seq_len); lower pack_len of group {plan.groups[-1].name!r} and set planner.overlong, or use a model builder "
            f"with a larger max_seq_len"
        )


def check_saved_plan(
    plans: "Sequence[EpochPlan]",
    epoch: int,
    lengths: NDArray[np.int32],
    groups: Sequence[PackingGroup],
    *,
    world_size: int,
    sample_ids: NDArray[np.int32] | None = None,
) -> "EpochPlan":
    """Take an epoch from saved plans, if they were made for this run.

    Args:
        plans: one per epoch.
        epoch: counted from 0.
        lengths: ``int32[num_samples]``, of the run's data.
        groups: of the run; only their recomputation may differ from the plan's, and replaces it.
        world_size: of the run.
        sample_ids: ``int32[num_drawn]``, the run's draw in this epoch; by default every sample once.

    Raises:
        ConfigError: there is no plan of this epoch, or it is of other groups, another world size or other data.
    """
    if epoch >= len(plans):
        raise ConfigError(f"the saved plan has {len(plans)} epochs, the run has more; plan again with the run's epochs")
    plan = plans[epoch]
    if plan.world_size != world_size:
        raise ConfigError(f"the saved plan is for {plan.world_size} ranks, the run has {world_size}; plan again for these")
    planned, current = ([(g.name, g.pack_len, g.cp_degree) for g in some] for some in (plan.groups, groups))
    if planned != current:
        raise ConfigError(f"the saved plan has groups {planned} (name, pack_len, cp_degree), the run {current}; plan again")
    ids = plan.sample_ids
    held = np.sort(np.concatenate((ids, plan.dropped)))
    drawn = np.arange(len(lengths)) if sample_ids is None else np.sort(sample_ids)
    if len(held) != len(drawn):
        raise ConfigError(f"the saved plan holds {len(held)} samples, the data {len(drawn)}; plan again with these data")
    if (last := int(held[-1])) >= len(lengths):
        raise ConfigError(f"the saved plan holds sample {last}, the data end at {len(lengths) - 1}; plan again with these data")
    if len(differ := np.flatnonzero(held != drawn)):
        first = min(held[differ[0]], drawn[differ[0]])
        raise ConfigError(
            f"the saved plan holds sample {first} {np.count_nonzero(held == first)} times, the run draws it "
            f"{np.count_nonzero(drawn == first)} times; plan again with the run's seed and weights"
        )
    if len(wrong := np.flatnonzero(plan.lengths != np.minimum(lengths[ids], groups[-1].pack_len))):
        first = int(ids[wrong[0]])
        raise ConfigError(
            f"sample {first} has {lengths[first]} tokens, in the saved plan {plan.lengths[wrong[0]]}; the plan is of other data "
            f"or lengths were estimated: plan again with these data and their tokenizer"
        )
    return replace(plan, groups=tuple(groups))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPack:
    """One rank's part in one pack: which samples, in which order, and where in the run.

    Args:
        sample_ids: ``int32[num_docs]``, in pack order; empty for a rank without work in this micro-step.
        lengths: ``int32[num_docs]``, tokens of each document as planned (truncated samples are shorter than stored).
        is_last_micro_step: the optimizer steps after this one.
        cp_rank: which shard of the pack this rank holds.
    """

    index: int
    group: PackingGroup
    step: int
    micro_step: int
    is_last_micro_step: bool
    cp_rank: int
    sample_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EpochPlan:
    """Every pack's group, step, micro-step and ranks for one epoch, as compressed rows.

    Packs are stored in training order (step, micro-step, first rank). Every rank has exactly one pack in every
    micro-step, an empty one where there is no work for it, so that all ranks run the same collectives.

    Args:
        sample_ids: ``int32[placed]``, pack by pack; a sample that was drawn twice is there twice.
        lengths: ``int32[placed]``, tokens of each placed sample, aligned with ``sample_ids``.
        pack_offsets: ``int64[packs + 1]``, where each pack's samples start in ``sample_ids``.
        pack_group: ``int16[packs]``, index into ``groups``.
        pack_step: ``int32[packs]``, optimizer step within the epoch.
        pack_micro_step: ``int16[packs]``, accumulation step within the optimizer step.
        pack_first_rank: ``int32[packs]``; the pack runs on ranks ``first_rank .. first_rank + cp_degree - 1``.
        dropped: ``int32[...]``, ids of samples longer than the longest group that were left out on request, or since no target of
            theirs would be left, as often as drawn.
        truncated: ``int32[...]``, ids of samples cut to the longest group's length on request, as often as drawn.
        cut: how they are cut, one of `CUTS`.
    """

    groups: tuple[PackingGroup, ...]
    world_size: int
    sample_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    pack_offsets: NDArray[np.int64]
    pack_group: NDArray[np.int16]
    pack_step: NDArray[np.int32]
    pack_micro_step: NDArray[np.int16]
    pack_first_rank: NDArray[np.int32]
    dropped: NDArray[np.int32]
    truncated: NDArray[np.int32]
    cut: str = CUTS[0]

    @property
    def num_packs(self) -> int:
        """Packs of the epoch, empty ones included."""
        return len(self.pack_group)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return int(self.pack_step[-1]) + 1

    @property
    def cp_degrees(self) -> NDArray[np.int64]:
        """CP degree of each pack, ``int64[packs]``."""
        return np.array([group.cp_degree for group in self.groups])[self.pack_group]

    @property
    def pack_of_sample(self) -> NDArray[np.int64]:
        """Pack index of each placed sample, ``int64[placed]``."""
        return np.repeat(np.arange(self.num_packs), np.diff(self.pack_offsets))

    @property
    def micro_step_starts(self) -> NDArray[np.int64]:
        """Index of each micro-step's first pack, ``int64[micro-steps]``: each starts at rank 0."""
        return np.flatnonzero(self.pack_first_rank == 0)

    @property
    def step_starts(self) -> NDArray[np.int64]:
        """Index of each optimizer step's first pack, ``int64[num_steps]``."""
        return np.flatnonzero(np.diff(self.pack_step, prepend=-1))

    @property
    def step_groups(self) -> NDArray[np.int16]:
        """Group of each optimizer step, ``int16[num_steps]``; a step draws from one group."""
        return self.pack_group[self.step_starts]

    @property
    def step_tokens(self) -> NDArray[np.int64]:
        """Real tokens of each optimizer step over all ranks, ``int64[num_steps]``."""
        return np.add.reduceat(self.sum_per_pack(self.lengths), self.step_starts)

    @property
    def hash(self) -> str:
        """A SHA-256 over everything that decides what is trained when; equal plans have equal hashes on every machine.

        Recomputation has no part in that: it may change in the middle of an epoch.
        """
        shapes = [(group.pack_len, group.cp_degree) for group in self.groups]
        digest = hashlib.sha256(repr((shapes, self.world_size)).encode())
        for field in ("sample_ids", "lengths", "pack_offsets", "pack_group", "pack_step", "pack_micro_step", "pack_first_rank"):
            digest.update(np.ascontiguousarray(getattr(self, field)).tobytes())
        if len(self.truncated):
            digest.update(self.cut.encode())
        return digest.hexdigest()

    def sum_per_pack(self, values: NDArray[np.generic]) -> NDArray[np.int64]:
        """Sum a per-placed-sample array over each pack; empty packs give 0."""
        return sum_rows(values, self.pack_offsets)

    def for_rank(self, rank: int) -> Iterator[PlannedPack]:
        """Yield this rank's packs in training order, one per micro-step."""
        for index in self.indices_for_rank(rank):
            yield self.pack(int(index), rank)

    def indices_for_rank(self, rank: int, *, first_step: int = 0, last_step: int | None = None) -> NDArray[np.int64]:
        """Give the pack indices of a rank in training order, one per micro-step.

        Args:
            rank: whose packs.
            first_step: the first optimizer step of the epoch to take.
            last_step: the first one not to take any more; by default all.
        """
        cp_rank = rank - self.pack_first_rank
        mine = (cp_rank >= 0) & (cp_rank < self.cp_degrees) & (self.pack_step >= first_step)
        return np.flatnonzero(mine & (self.pack_step < (self.num_steps if last_step is None else last_step)))

    def pack(self, index: int, rank: int) -> PlannedPack:
        """Give pack ``index`` as ``rank`` sees it; ``rank`` must be one of the pack's ranks."""
        span = slice(int(self.pack_offsets[index]), int(self.pack_offsets[index + 1]))
        group = self.groups[self.pack_group[index]]
        cp_rank = rank - int(self.pack_first_rank[index])
        assert 0 <= cp_rank < group.cp_degree, f"rank {rank} has no part in pack {index}"
        # Packs are in training order and every micro-step of a step holds world_size / cp_degree of them.
        following = index + self.world_size // group.cp_degree
        return PlannedPack(
            index=index,
            group=group,
            step=int(self.pack_step[index]),
            micro_step=int(self.pack_micro_step[index]),
            is_last_micro_step=following >= self.num_packs or bool(self.pack_step[following] != self.pack_step[index]),
            cp_rank=cp_rank,
            sample_ids=self.sample_ids[span],
            lengths=self.lengths[span],
        )

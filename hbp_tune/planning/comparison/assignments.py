"""Other systems' way to share samples over ranks, for comparison: CP degrees mixed within a micro-step, chosen batch by batch."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import PackingError
from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.records import PackingGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedDegrees:
    """How samples of a batch are put onto ranks.

    Args:
        group: whose tokens a rank and recomputation all packs have, whatever their CP degree.
        widenings: factors of the smallest CP degree that long samples are tried with; the fastest is taken.
        spreads: whether long samples of a batch are spread over its micro-steps, or put together; the faster is taken.
        more_micro_steps: beyond the fewest that hold the batch, so many more are tried.
        by_attention: balance ``len ** 2`` per rank alone, rather than modelled cost.
    """

    group: PackingGroup
    widenings: tuple[int, ...] = (1,)
    spreads: tuple[bool, ...] = (True,)
    more_micro_steps: int = 0
    by_attention: bool = False

    @property
    def local_len(self) -> int:
        """Most tokens of a rank in a micro-step."""
        return self.group.pack_len // self.group.cp_degree


def flexsp(group: PackingGroup) -> MixedDegrees:
    """Divide like FlexSP (arXiv 2412.01523): mixed CP degrees per batch, so that the makespan is least.

    Longest processing time first with a choice of degrees, a dozen ways for each batch, in place of its mixed-integer program,
    which takes 5 to 15 s a batch; one recomputation for all, as its batches have.
    """
    return MixedDegrees(group=group, widenings=(1, 2, 4), spreads=(True, False), more_micro_steps=1)


def dynamic_cp(group: PackingGroup) -> MixedDegrees:
    """Divide like Megatron-LM's dynamic context parallelism: the smallest degree that holds a sample, balance by attention."""
    return MixedDegrees(group=group, by_attention=True)


def least_mixed_s(lengths: NDArray[np.int32], groups: Sequence[PackingGroup], *, world_size: int, cost: CostModel) -> float:
    """Bound an epoch from below whose steps mix CP degrees: how much could mixing add to balance packing?

    Every sample is on as many ranks as do it in least time, in packs with the tokens a rank and the recomputation of any of the
    groups; all packs are full, no rank ever waits, and no weights are gathered.

    Args:
        lengths: ``int32[num_samples]``.
        groups: of the balance packing that is compared.
        world_size: ranks of the run.
        cost: of the model on the machine.

    Returns:
        Seconds.
    """
    wide = lengths.astype(np.int64)
    least = np.full(len(wide), np.inf)
    for group, power in itertools.product(groups, range(world_size.bit_length())):
        degree, local_len = np.full(len(wide), 2**power), group.pack_len // group.cp_degree
        seconds = cost.pack_seconds(wide, wide**2, degree, np.full(len(wide), group.ac_layers), group.ac_mode == "selective")
        all_ranks_s = seconds.total * degree + cost.micro_step_s * wide / local_len
        least = np.minimum(least, np.where(wide <= local_len * degree, all_ranks_s, np.inf))
    return float(least.sum()) / world_size


@dataclass(slots=True)
class _Pack:
    cp_degree: int
    room: int
    load: float = 0.0
    tokens: int = 0
    squares: int = 0


def assign_epoch(
    lengths: NDArray[np.int32],
    how: MixedDegrees,
    *,
    tokens_per_step: int,
    world_size: int,
    cost: CostModel,
    seed: int = 0,
) -> PackWork:
    """Divide an epoch, batch by batch in random order; every sample is in one pack.

    Args:
        lengths: ``int32[num_samples]``.
        how: the samples of a batch are put onto ranks.
        tokens_per_step: of a batch.
        world_size: ranks.
        cost: of the model on the machine.
        seed: of the order.

    Raises:
        PackingError: a sample is longer than all ranks hold.
    """
    if (longest := int(lengths.max())) > world_size * how.local_len:
        raise PackingError(
            f"a sample has {longest} tokens, {world_size} ranks hold {world_size * how.local_len}; "
            f"give longer packs or more ranks"
        )
    shuffled = lengths[hashed_order(len(lengths), seed=seed, epoch=0, stream="assignment")].astype(np.int64)
    batch_of = (np.cumsum(shuffled) - shuffled) // tokens_per_step
    parts: list[PackWork] = []
    for batch in np.split(shuffled, np.flatnonzero(np.diff(batch_of)) + 1):
        descending = np.sort(batch)[::-1]
        fewest = max(1, -(-int(descending.sum()) // (world_size * how.local_len)))
        tried: list[PackWork] = []
        for micro_steps in itertools.count(fewest):
            tries = itertools.product(how.widenings, how.spreads)
            packs = [_try_batch(descending, how, *one, world_size, micro_steps, cost) for one in tries]
            tried += [_work_of(each, how, world_size) for each in packs if each is not None]
            if tried and micro_steps >= fewest + how.more_micro_steps:
                break
        parts.append(min(tried, key=lambda work: simulate(work, cost).epoch_s))
    return _joined(parts)


def _work_of(packs: Sequence[Sequence["_Pack"]], how: MixedDegrees, world_size: int) -> PackWork:
    flat = [pack for step in packs for pack in step]
    return PackWork(
        tokens=np.array([pack.tokens for pack in flat]),
        squares=np.array([pack.squares for pack in flat]),
        cp_degree=np.array([pack.cp_degree for pack in flat]),
        ac_layers=np.full(len(flat), how.group.ac_layers),
        keeps_attention=np.full(len(flat), how.group.ac_mode == "selective"),
        micro_step_starts=np.cumsum([0, *(len(step) for step in packs[:-1])]),
        world_size=world_size,
    )


def _try_batch(
    descending: NDArray[np.int64],
    how: MixedDegrees,
    widening: int,
    spread: bool,
    world_size: int,
    micro_steps: int,
    cost: CostModel,
) -> list[list[_Pack]] | None:
    """Put samples, from long to short, onto the ranks of so many micro-steps; None where they do not fit.

    Long samples are spread over the micro-steps, or come together in as few as hold them.
    """
    free = [world_size] * micro_steps
    packs: list[list[_Pack]] = [[] for _ in range(micro_steps)]
    degrees = [_degree(int(length), how.local_len, widening, world_size) for length in descending]
    num_long = sum(degree > 1 for degree in degrees)
    for length, degree in zip(descending[:num_long].tolist(), degrees[:num_long], strict=True):
        roomy = [index for index in range(micro_steps) if free[index] >= degree]
        if roomy:
            step = max(roomy, key=free.__getitem__) if spread else min(roomy, key=free.__getitem__)
            packs[step].append(_Pack(degree, degree * how.local_len))
            free[step] -= degree
            _put(packs[step][-1], length, how, cost)
            continue
        holding = [pack for step_packs in packs for pack in step_packs if pack.room >= length]
        if not holding:
            return None
        _put(min(holding, key=lambda pack: pack.load), length, how, cost)
    for step, ranks in enumerate(free):
        packs[step] += [_Pack(1, how.local_len) for _ in range(ranks)]
    return packs if _level(descending[num_long:], packs, how, cost) else None


def _level(descending: NDArray[np.int64], packs: Sequence[Sequence[_Pack]], how: MixedDegrees, cost: CostModel) -> bool:
    """Put each sample into the least loaded pack with room; tell whether all found one."""
    heap = [(pack.load, index, pack) for index, pack in enumerate(pack for step in packs for pack in step)]
    heapq.heapify(heap)
    for length in descending.tolist():
        full = []
        while heap and heap[0][2].room < length:
            full.append(heapq.heappop(heap))
        if not heap:
            return False
        _, index, pack = heapq.heappop(heap)
        _put(pack, length, how, cost)
        heapq.heappush(heap, (pack.load, index, pack))
        for entry in full:  # it may hold a shorter one
            heapq.heappush(heap, entry)
    return True


def _put(pack: _Pack, length: int, how: MixedDegrees, cost: CostModel) -> None:
    work = length**2 if how.by_attention else length * (length + cost.double_len)
    pack.load += work / pack.cp_degree
    pack.room -= length
    pack.tokens += length
    pack.squares += length**2


def _degree(length: int, local_len: int, widening: int, world_size: int) -> int:
    """Give the smallest power of two of ranks that hold a sample, times the widening where it is more than one."""
    needed = 1 << (-(-length // local_len) - 1).bit_length()
    return min(needed * widening, 1 << (world_size.bit_length() - 1)) if needed > 1 else 1


def _joined(parts: Sequence[PackWork]) -> PackWork:
    first = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])])
    return PackWork(
        tokens=np.concatenate([part.tokens for part in parts]),
        squares=np.concatenate([part.squares for part in parts]),
        cp_degree=np.concatenate([part.cp_degree for part in parts]),
        ac_layers=np.concatenate([part.ac_layers for part in parts]),
        keeps_attention=np.concatenate([part.keeps_attention for part in parts]),
        micro_step_starts=np.concatenate([part.micro_step_starts + start for part, start in zip(parts, first, strict=True)]),
        world_size=parts[0].world_size,
    )

"""Steps that mix CP degrees, planned over a whole epoch as balance packing is: what would mixing add to one group a step?"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.simulation import PackWork
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.groups import check_lengths
from hbp_tune.planning.packing.leveling import cost_limit, fill_gaps
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup, check_groups

# Short samples, for each rank, that may fill a micro-step of long ones.
_CANDIDATES = 128


class _Levels(NamedTuple):
    """The packs that documents may go to, from few ranks to many.

    Args:
        degrees: ``int64[levels]``, ranks that share a pack, each a multiple of the one before.
        pack_lens: ``int64[levels]``, tokens that a pack holds, ascending.
    """

    degrees: NDArray[np.int64]
    pack_lens: NDArray[np.int64]


class _Documents(NamedTuple):
    """Samples that wait.

    Args:
        lengths: ``int64[n]``.
        load: ``float64[n, levels]``, seconds that a document adds to each rank of a pack.
    """

    lengths: NDArray[np.int64]
    load: NDArray[np.float64]


class _MicroStep(NamedTuple):
    """Packs of one micro-step.

    Args:
        place: ``int64[n]``, pack of each document; -1 where it stays for a later one.
        level: ``int64[packs]``.
        load: ``float64[packs]``, of each rank of a pack.
    """

    place: NDArray[np.int64]
    level: NDArray[np.int64]
    load: NDArray[np.float64]


def assign_mixed(
    lengths: NDArray[np.int32], groups: Sequence[PackingGroup], *, world_size: int, cost: CostModel, seed: int = 0
) -> PackWork:
    """Divide an epoch: micro-steps of long samples, each on the fewest ranks that are done in time, then those of short ones.

    As in `level_heavy`, the longest sample left heads a micro-step, others in order of length join it, and short samples fill
    all packs up to its time. Here each sample has a CP degree of its own, the head that with which least time is lost.

    Args:
        lengths: ``int32[num_samples]``.
        groups: settings of packs, one for each CP degree, from few ranks to many.
        world_size: ranks of the run.
        cost: predicts seconds.
        seed: of the order of short samples.
    """
    levels, load = _levels_of(groups, world_size), _load(lengths, groups, cost)
    check_lengths(lengths, "error", groups, np.arange(len(lengths), dtype=np.int32))
    shuffled = hashed_order(len(lengths), seed=seed, epoch=0, stream="mixed")
    short = groups[0]
    own = lengths[lengths <= short.pack_len]
    is_light = lengths[shuffled] <= cost_limit(own, short.pack_len, cost, world_size // short.cp_degree)
    light, heavy = shuffled[is_light].astype(np.int64), shuffled[~is_light].astype(np.int64)
    heavy = heavy[np.argsort(-lengths[heavy], kind="stable")]
    others = light if len(light) else heavy
    rate = load[others].sum(axis=0) / int(lengths[others].sum(dtype=np.int64))
    works: list[_Filled] = []
    while len(heavy):
        documents = _Documents(lengths[heavy].astype(np.int64), load[heavy])
        made = _best_micro_step(documents, levels, world_size, rate)
        is_placed = made.place >= 0
        next_ones = light[: _CANDIDATES * world_size]
        room = levels.pack_lens[made.level]
        np.subtract.at(room, made.place[is_placed], documents.lengths[is_placed])
        gap = made.load.max() - made.load
        fill = fill_gaps(lengths[next_ones].astype(np.int64), load[next_ones], made.level, room, gap)
        taken = np.flatnonzero(fill >= 0)
        place = np.concatenate((made.place[is_placed], fill[taken]))
        works.append(_Filled.of(lengths[np.concatenate((heavy[is_placed], light[taken]))], place, made.level))
        heavy, light = heavy[~is_placed], np.delete(light, taken)
    if len(light):
        ids = light.astype(np.int32)
        plan = BalancePlanner().plan(lengths, lengths, [short], world_size=world_size, seed=seed, cost=cost, sample_ids=ids)
        works += _micro_steps_of(plan)
    return _joined(works, groups, levels, world_size)


@dataclass(frozen=True, slots=True, eq=False)
class _Filled:
    """Tokens, squares and levels of the packs of a micro-step."""

    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]
    level: NDArray[np.int64]

    @classmethod
    def of(cls, lengths: NDArray[np.int32], place: NDArray[np.int64], level: NDArray[np.int64]) -> "_Filled":
        tokens, squares = np.zeros(len(level), dtype=np.int64), np.zeros(len(level), dtype=np.int64)
        wide = lengths.astype(np.int64)
        np.add.at(tokens, place, wide)
        np.add.at(squares, place, wide**2)
        return cls(tokens, squares, level)


def _micro_steps_of(plan: EpochPlan) -> Iterator[_Filled]:
    """Give the micro-steps of a plan of the first level alone."""
    work = PackWork.of_plan(plan)
    for first, last in itertools.pairwise([*work.micro_step_starts.tolist(), len(work.tokens)]):
        yield _Filled(work.tokens[first:last], work.squares[first:last], np.zeros(last - first, dtype=np.int64))


def _joined(works: Sequence[_Filled], groups: Sequence[PackingGroup], levels: _Levels, world_size: int) -> PackWork:
    level = np.concatenate([work.level for work in works])
    return PackWork(
        tokens=np.concatenate([work.tokens for work in works]),
        squares=np.concatenate([work.squares for work in works]),
        cp_degree=levels.degrees[level],
        ac_layers=np.array([group.ac_layers for group in groups])[level],
        keeps_attention=np.array([group.ac_mode == "selective" for group in groups])[level],
        micro_step_starts=np.cumsum([0, *(len(work.level) for work in works[:-1])]),
        world_size=world_size,
    )


def _levels_of(groups: Sequence[PackingGroup], world_size: int) -> _Levels:
    """Take the levels from groups.

    Raises:
        ConfigError: the CP degrees do not grow, or one does not divide the next: ranks would not line up.
    """
    check_groups(groups, world_size)
    degrees = [group.cp_degree for group in groups]
    if any(more % fewer or more == fewer for fewer, more in itertools.pairwise(degrees)):
        raise ConfigError(f"cp_degrees {degrees} must each be a multiple of the one before, to share micro-steps")
    return _Levels(np.array(degrees), np.array([group.pack_len for group in groups]))


def _load(lengths: NDArray[np.int32], groups: Sequence[PackingGroup], cost: CostModel) -> NDArray[np.float64]:
    """Seconds that each document adds to each rank of a pack of each group, ``float64[num_samples, groups]``."""
    wide, ones = lengths.astype(np.int64), np.ones(len(lengths), dtype=np.int64)
    columns = [
        cost.pack_seconds(wide, wide**2, group.cp_degree * ones, group.ac_layers * ones, group.ac_mode == "selective").total
        for group in groups
    ]
    return np.stack(columns, axis=1)


def _best_micro_step(documents: _Documents, levels: _Levels, world_size: int, rate: NDArray[np.float64]) -> _MicroStep:
    """Try the CP degrees of the longest document, each as the time that all have; count what short samples will fill.

    Args:
        documents: that wait, longest first.
        levels: to choose from.
        world_size: ranks.
        rate: ``float64[levels]``, seconds of each rank for a token of short samples.
    """
    fits = levels.pack_lens >= documents.lengths[:, None]
    targets = np.unique(np.maximum(levels.pack_lens[0] * rate[0], documents.load[0][fits[0]]))

    def use(made: _MicroStep, target: float) -> float:
        """Count the seconds that one rank would take for what all do, over theirs: exchange and idle time are no use."""
        is_placed = made.place >= 0
        tokens = np.bincount(made.place[is_placed], documents.lengths[is_placed], minlength=len(made.level))
        room = np.minimum(levels.pack_lens[made.level] - tokens, (target - made.load) / rate[made.level])
        return float(documents.load[is_placed, 0].sum() + room.sum() * rate[0]) / target

    tried = []
    for target in targets.tolist():
        made = _compose(documents, np.argmax(fits & (documents.load <= target), axis=1), levels, world_size, target)
        tried.append((use(made, target), made))
    return max(tried, key=lambda each: each[0])[1]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _compose(documents: _Documents, wanted: NDArray[np.int64], levels: _Levels, world_size: int, target: float) -> _MicroStep:
    """Place what fits, longest first, into the fullest pack that is still done in time, or into one of the wanted level.

    Ranks that are left have packs of the first level.
    """
    place = np.full(len(wanted), -1, dtype=np.int64)
    level = np.zeros(world_size, dtype=np.int64)
    load, room = np.zeros(world_size), np.zeros(world_size, dtype=np.int64)
    num, free = 0, world_size
    for i in range(len(place)):
        best = -1
        for pack in range(num):
            fits = room[pack] >= documents.lengths[i] and load[pack] + documents.load[i, level[pack]] <= target
            if fits and (best < 0 or load[pack] > load[best]):
                best = pack
        if best < 0 and levels.degrees[wanted[i]] <= free:
            best = num
            level[num], room[num] = wanted[i], levels.pack_lens[wanted[i]]
            free -= levels.degrees[wanted[i]]
            num += 1
        if best >= 0:
            place[i] = best
            room[best] -= documents.lengths[i]
            load[best] += documents.load[i, level[best]]
    num += free // levels.degrees[0]  # the first level is what `level` began with
    return _MicroStep(place, level[:num], load[:num])

"""Which packing groups to train with: candidates that fit, and the set of them whose whole plan takes the least modelled time."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.cost import CostModel
from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.hashing import hashed_order
from hbp_tune.components.planning.metrics import micro_step_s
from hbp_tune.components.planning.planner import BalancePlanner
from hbp_tune.components.planning.records import PackingGroup

# The fewest recomputed layers with which a group fits, whatever its own; None where it fits with none.
Fewest = Callable[[PackingGroup], int | None]
SHORTEST_LEN = 2048
# Plans of at most so many samples stand for all of the data while sets are compared; the best ones are planned again in full.
_SAMPLES, _FINALISTS, _PLANNED = 30_000, 3, 12
MAX_GROUPS = 4
# Fewer tokens of a rank leave its kernels idle, and exchange would wait for latencies that the cost model does not know.
_SHORTEST_LOCAL_LEN = 512
# What a further group must bring, as a share of the time: the model is no better than that, and fewer groups mix more samples.
_WORTH = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupChoice:
    """The groups that were chosen, and what else was looked at.

    Args:
        groups: from short to long.
        epoch_s: modelled seconds of an epoch with them.
        without_s: modelled seconds without each of the groups in turn; None for the longest, which must be there.
        others: sets that were planned in full beside it, with their modelled seconds, the best first.
        one_length: the best single group and its modelled seconds.
    """

    groups: tuple[PackingGroup, ...]
    epoch_s: float
    without_s: tuple[float | None, ...]
    others: tuple[tuple[tuple[PackingGroup, ...], float], ...]
    one_length: tuple[PackingGroup, float]


def length_name(pack_len: int) -> str:
    """Name a group by its length: ``16K``, or the number of tokens where that is no multiple of 1,024."""
    return f"{pack_len // 1024}K" if pack_len % 1024 == 0 else str(pack_len)


def candidate_groups(
    longest: int,
    fewest: Fewest,
    *,
    world_size: int,
    shortest: int = SHORTEST_LEN,
    max_cp_degree: int | None = None,
    ac_mode: str = "full",
    must_hold_all: bool = True,
) -> tuple[PackingGroup, ...]:
    """List groups that fit: lengths from ``shortest`` on, doubled until they hold the longest sample, at every CP degree.

    Args:
        longest: tokens of the longest sample that is trained.
        fewest: what fits.
        world_size: ranks of the run; CP degrees are the powers of two that divide it.
        shortest: tokens of the shortest packs.
        max_cp_degree: largest CP degree to consider; ``world_size`` where left out.
        ac_mode: of all groups.
        must_hold_all: whether the longest sample must fit; else longer ones are dropped or truncated (``planner.overlong``).

    Returns:
        At least one, that holds the longest sample if it must; where there is none, `check_candidates` says so.
    """
    degrees = [2**power for power in range(world_size.bit_length()) if world_size % 2**power == 0]
    degrees = [degree for degree in degrees if degree <= (max_cp_degree or world_size)]
    lengths = [shortest]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    found = []
    for pack_len, cp_degree in itertools.product(lengths, degrees):
        if pack_len % (2 * cp_degree) or pack_len // cp_degree < _SHORTEST_LOCAL_LEN:
            continue
        group = PackingGroup(name=length_name(pack_len), pack_len=pack_len, cp_degree=cp_degree, ac_mode=ac_mode)
        if (ac_layers := fewest(group)) is not None:
            found.append(replace(group, ac_layers=ac_layers))
    check_candidates(found, longest if must_hold_all else 0, cp_degree=degrees[-1])
    return tuple(found)


def check_candidates(candidates: Sequence[PackingGroup], longest: int, *, cp_degree: int) -> None:
    """Refuse candidates that cannot hold the data.

    Args:
        candidates: groups that fit.
        longest: tokens of the longest sample that is trained.
        cp_degree: the largest one that was tried, for the message.

    Raises:
        ConfigError: there is none, or none that holds the longest sample.
    """
    way_out = "start more ranks, set ac_mode=selective or offload, or keep weights and optimizer states in bf16"
    if not candidates:
        raise ConfigError(f"no packing group fits into memory, not the shortest over {cp_degree} ranks either; {way_out}")
    if (most := max(group.pack_len for group in candidates)) < longest:
        raise ConfigError(
            f"the longest sample has {longest} tokens, the longest packing group that fits into memory holds {most} "
            f"(CP degrees up to {cp_degree} were tried); {way_out}, or set planner.overlong"
        )


class GroupSelector:
    """Compares sets of groups by the modelled time of the plans that they give.

    Beyond the HBP paper's rule (`paper_rule`), which compares lengths by the speed of each alone.

    Args:
        lengths: ``int32[num_samples]``, of all samples, none longer than the longest candidate.
        planner: as it will plan the run.
        cost: of the model on the machine.
        world_size: ranks of the run.
        seed: of plans, and of the samples that stand for all.
    """

    def __init__(
        self, lengths: NDArray[np.int32], *, planner: BalancePlanner, cost: CostModel, world_size: int, seed: int = 0
    ) -> None:
        self._lengths = lengths
        order = hashed_order(len(lengths), seed=seed, epoch=0, stream="selection")
        self._some = lengths[order[:_SAMPLES]]
        self._planner, self._cost, self._world_size, self._seed = planner, cost, world_size, seed

    def select(self, candidates: Sequence[PackingGroup]) -> GroupChoice:
        """Choose groups; the same for the same arguments.

        Every set of lengths that holds the longest sample is estimated in closed form, each length with the strategy (CP degree)
        that is fastest for the samples that it would get. The lowest estimates of each number of groups are planned for some
        of the samples, the best of these for all. Of sets within a hundredth of the least time the smallest is chosen.

        Args:
            candidates: groups that fit.
        """
        check_candidates(candidates, int(self._lengths.max()), cp_degree=max((g.cp_degree for g in candidates), default=1))
        sets = sorted(self._sets(candidates), key=lambda groups: self.estimate_s(groups))
        # Planned one by one: how well packs of one length balance depends on their CP degree, which the estimate does not see.
        singles = [(group,) for group in candidates if group.pack_len == sets[0][-1].pack_len]
        single = min(singles, key=lambda groups: self.epoch_s(groups, self._some))
        sizes = range(1, MAX_GROUPS + 1)
        tried = [groups for size in sizes for groups in [x for x in sets if len(x) == size][: _PLANNED // MAX_GROUPS]]
        planned = sorted(tried, key=lambda groups: self.epoch_s(groups, self._some))
        smaller = [groups for groups in planned if len(groups) < len(planned[0])]
        finalists = dict.fromkeys([*planned[:_FINALISTS], *smaller[:_FINALISTS], single])
        seconds = {groups: self.epoch_s(groups, self._lengths) for groups in finalists}
        least_s = min(seconds.values())
        best = min(seconds, key=lambda groups: (seconds[groups] > (1 + _WORTH) * least_s, len(groups), seconds[groups]))
        without = [best[:index] + best[index + 1 :] for index in range(len(best) - 1)]
        return GroupChoice(
            groups=best,
            epoch_s=seconds[best],
            without_s=(*(self.epoch_s(groups, self._lengths) for groups in without), None),
            others=tuple(sorted(((g, s) for g, s in seconds.items() if g != best), key=lambda pair: pair[1])),
            one_length=(single[0], seconds[single]),
        )

    def estimate_s(self, groups: Sequence[PackingGroup]) -> float:
        """Estimate an epoch's seconds in closed form: every sample in the shortest group that holds it, perfect balance."""
        starts = (0, *(group.pack_len for group in groups[:-1]))
        return sum(self._range_s(group, start) for group, start in zip(groups, starts, strict=True))

    def s_per_token(self, group: PackingGroup) -> float:
        """Estimate a rank's seconds for each token that it trains, of all samples that the group holds."""
        tokens = int(self._lengths[self._lengths <= group.pack_len].sum(dtype=np.int64))
        return self._range_s(group, 0) * self._world_size / tokens if tokens else float("inf")

    def epoch_s(self, groups: Sequence[PackingGroup], lengths: NDArray[np.int32]) -> float:
        """Plan an epoch, and give its modelled seconds."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is worth saying is said about the plan that is trained
            ones = np.ones_like(lengths)
            plan = self._planner.plan(lengths, ones, groups, world_size=self._world_size, seed=self._seed, cost=self._cost)
        return float(micro_step_s(plan, self._cost).sum())

    def _sets(self, candidates: Sequence[PackingGroup]) -> list[tuple[PackingGroup, ...]]:
        """List sets of lengths, each with the fastest strategy for what it gets; the last one holds the longest sample."""
        pack_lens = sorted({group.pack_len for group in candidates})
        longest = int(self._lengths.max())
        last = min(pack_len for pack_len in pack_lens if pack_len >= longest)
        shorter = [pack_len for pack_len in pack_lens if pack_len < last]
        sets = []
        for size in range(min(MAX_GROUPS, len(shorter) + 1)):
            for chosen in itertools.combinations(shorter, size):
                starts = (0, *chosen)
                sets.append(
                    tuple(self._fastest(candidates, end, start) for start, end in zip(starts, (*chosen, last), strict=True))
                )
        return sets

    def _fastest(self, candidates: Sequence[PackingGroup], pack_len: int, start: int) -> PackingGroup:
        strategies = [group for group in candidates if group.pack_len == pack_len]
        return min(strategies, key=lambda group: (self._range_s(group, start), group.cp_degree))

    def _range_s(self, group: PackingGroup, start: int) -> float:
        """Estimate the seconds of all samples with more than ``start`` tokens, up to the group's length."""
        mine = self._lengths[(self._lengths > start) & (self._lengths <= group.pack_len)].astype(np.int64)
        if not len(mine):
            return 0.0
        sums = (np.array([mine.sum()]), np.array([(mine**2).sum()]))
        layers, keeps = np.array([group.ac_layers]), group.ac_mode == "selective"
        seconds = self._cost.pack_seconds(*sums, np.array([group.cp_degree]), layers, keeps).total[0]
        replicas = self._world_size // group.cp_degree
        micro_steps = max(1.0, int(sums[0][0]) / (group.pack_len * replicas))
        fixed_s = self._cost.micro_step_s * micro_steps
        return max(float(seconds) / replicas + fixed_s, self._cost.gather_s(self._world_size) * micro_steps)


def paper_rule(s_per_token: Sequence[tuple[PackingGroup, float]], fewest: Fewest) -> tuple[PackingGroup, ...]:
    """Choose groups by the HBP paper's Algorithm 1.

    Stage 1 keeps the fastest strategy of each length; l_best is the length whose strategy is the fastest per token, l_max the
    longest. Stage 2 adds what a rank of each holds by itself, l_best / cp and l_max / cp, which train without communication; the
    latter is merged into l_best where it is shorter.

    Args:
        s_per_token: groups that fit, with a rank's seconds for each token that it trains, at equal tokens per rank.
        fewest: recomputed layers of the groups that stage 2 adds.

    Raises:
        ConfigError: there is no group.
    """
    if not s_per_token:
        raise ConfigError("no packing group was measured that fits; nothing can be chosen")
    fastest: dict[int, tuple[PackingGroup, float]] = {}
    for group, seconds in s_per_token:
        if group.pack_len not in fastest or seconds < fastest[group.pack_len][1]:
            fastest[group.pack_len] = (group, seconds)
    best = min(fastest.values(), key=lambda pair: pair[1])[0]
    longest = fastest[max(fastest)][0]
    chosen = {best.pack_len: best, longest.pack_len: longest}
    for group, is_kept in ((best, True), (longest, longest.pack_len // longest.cp_degree >= best.pack_len)):
        local = group.pack_len // group.cp_degree
        if not is_kept or local in chosen:
            continue
        alone = replace(group, name=length_name(local), pack_len=local, cp_degree=1)
        if (ac_layers := fewest(alone)) is not None:
            chosen[local] = replace(alone, ac_layers=ac_layers)
    return tuple(chosen[pack_len] for pack_len in sorted(chosen))

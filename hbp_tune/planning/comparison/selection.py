"""Which packing groups to train with: candidates that fit, and the set of them whose whole plan takes the least modelled time."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.metrics import micro_step_s
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import STEP_TOLERANCE, BalancePlanner
from hbp_tune.planning.plans.hashing import hashed_order
from hbp_tune.planning.plans.records import PackingGroup

# The fewest recomputed layers with which a group fits, whatever its own; None where it fits with none.
Fewest = Callable[[PackingGroup], int | None]
SHORTEST_LEN = 2048
# Plans of at most so many samples, more on many ranks, stand for all of the data while sets are compared: fewer would fill less
# than a step of the long groups. The best ones are planned again in full.
_SAMPLES, _SAMPLES_PER_RANK, _FINALISTS = 30_000, 1000, 3
# Of each number of groups so many are planned: the closed form was within 2% of plans where it was compared.
_PLANNED = 3
MAX_GROUPS = 4
# Fewer tokens of a rank leave its kernels idle, and exchange would wait for latencies that the cost model does not know.
_SHORTEST_LOCAL_LEN = 512
# The paper looks at lengths from 8K on.
_PAPER_SHORTEST_LEN = 8192
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
    """Name a group by its length: ``16K``, or the number of tokens where that is not a multiple of 1,024."""
    return f"{pack_len // 1024}K" if pack_len % 1024 == 0 else str(pack_len)


def candidate_groups(
    longest: int,
    fewest: Fewest,
    *,
    world_size: int,
    shortest: int = SHORTEST_LEN,
    max_cp_degree: int | None = None,
    ac_modes: Sequence[str] = ("full",),
) -> tuple[PackingGroup, ...]:
    """List groups that fit: lengths from ``shortest`` on, doubled until they hold the longest sample, at every CP degree.

    And the longest sample's own length, rounded up: it may fit, or need less recomputation, where its double does not.

    Args:
        longest: tokens of the longest sample that is trained.
        fewest: what fits.
        world_size: ranks of the run; CP degrees are the powers of two that divide it.
        shortest: tokens of the shortest packs.
        max_cp_degree: largest CP degree to consider; ``world_size`` where left out.
        ac_modes: ways to recompute; of those that need no layer the first is listed.

    Returns:
        Groups by length, CP degree and mode, perhaps none that holds the longest sample: see `check_candidates`.
    """
    degrees = [2**power for power in range(world_size.bit_length()) if world_size % 2**power == 0]
    degrees = [degree for degree in degrees if degree <= (max_cp_degree or world_size)]
    lengths = [shortest]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    own = -(-longest // shortest) * shortest
    found = []
    for pack_len, cp_degree in itertools.product(sorted({*lengths, own}), degrees):
        if pack_len % (2 * cp_degree) or pack_len // cp_degree < _SHORTEST_LOCAL_LEN:
            continue
        for ac_mode in ac_modes:
            group = PackingGroup(name=length_name(pack_len), pack_len=pack_len, cp_degree=cp_degree, ac_mode=ac_mode)
            if (ac_layers := fewest(group)) is not None:
                found.append(replace(group, ac_layers=ac_layers))
            if ac_layers == 0:
                break  # other modes have nothing to recompute either
    return tuple(found)


def check_candidates(candidates: Sequence[PackingGroup], longest: int, *, shortage: str = "") -> None:
    """Refuse candidates that cannot hold the data.

    Args:
        candidates: groups that fit.
        longest: tokens of the longest sample that is trained.
        shortage: what the smallest group needs and what there is, for the message.

    Raises:
        ConfigError: there is none, or none that holds the longest sample.
    """
    way_out = "start more ranks, keep weights in bf16 and optimizer states in 8 bits, or give groups with ac_mode=offload"
    if not candidates:
        raise ConfigError(f"no packing group fits into memory{shortage and f' ({shortage})'}; {way_out}")
    most = max(candidates, key=lambda group: (group.pack_len, group.cp_degree))
    if most.pack_len < longest:
        raise ConfigError(
            f"the longest sample has {longest} tokens, the longest packing group that fits into memory holds {most.pack_len}, "
            f"over {most.cp_degree} ranks; {way_out}, or set planner.overlong"
        )


class GroupSelector:
    """Compares sets of groups by the modelled time of the plans that they give.

    Beyond the HBP paper's rule (`paper_rule`), which compares lengths by the speed of each alone.

    Args:
        lengths: ``int32[num_samples]``, of all samples, none longer than the longest candidate; at least one.
        planner: as it will plan the run.
        cost: of the model on the machine.
        world_size: ranks of the run.
        seed: of plans, and of the samples that stand for all.
    """

    def __init__(
        self, lengths: NDArray[np.int32], *, planner: BalancePlanner, cost: CostModel, world_size: int, seed: int = 0
    ) -> None:
        self._lengths = self._some = lengths
        if len(lengths) > (enough := max(_SAMPLES, _SAMPLES_PER_RANK * world_size)):
            self._some = lengths[hashed_order(len(lengths), seed=seed, epoch=0, stream="selection")[:enough]]
        self._planner, self._cost, self._world_size, self._seed = planner, cost, world_size, seed
        # Sums over any range of lengths are differences of these.
        self._sorted = np.sort(lengths).astype(np.int64)
        self._tokens, self._squares = (np.append(0, np.cumsum(self._sorted**power)) for power in (1, 2))

    def select(self, candidates: Sequence[PackingGroup]) -> GroupChoice:
        """Choose groups; the same for the same arguments.

        Every set of lengths that holds the longest sample is estimated in closed form, each length with the strategy (CP degree
        and recomputation) that is fastest for the samples that it would get. The lowest estimates of each number of groups are
        planned. Of sets within a hundredth of the least time the smallest is chosen.

        Args:
            candidates: groups that fit. Those of which one micro-step would hold more than the planner's ``tokens_per_step`` are
                left out, as long as others hold the longest sample.
        """
        check_candidates(candidates, int(self._sorted[-1]))
        candidates = self._within_a_step(_fewest_recomputed(candidates))
        seconds = {groups: self._plan_s(groups, self._some) for groups in self._promising(candidates)}
        finalists = _shortlist(seconds)
        if self._some is not self._lengths:
            seconds = {groups: self.epoch_s(groups) for groups in finalists}
        finalists.sort(key=lambda groups: seconds[groups])
        enough_s = (1 + _WORTH) * seconds[finalists[0]]
        best = min((groups for groups in finalists if seconds[groups] <= enough_s), key=len)
        single = next(groups for groups in finalists if len(groups) == 1)
        without = [best[:index] + best[index + 1 :] for index in range(len(best) - 1)]
        return GroupChoice(
            groups=best,
            epoch_s=seconds[best],
            without_s=(*(seconds[groups] if groups in seconds else self.epoch_s(groups) for groups in without), None),
            others=tuple((groups, seconds[groups]) for groups in finalists if groups != best),
            one_length=(single[0], seconds[single]),
        )

    def _within_a_step(self, candidates: Sequence[PackingGroup]) -> Sequence[PackingGroup]:
        """Leave out groups with which optimizer steps would be larger than asked."""
        tokens_per_step = getattr(self._planner, "tokens_per_step", None)  # a planner of the user's may have none
        if tokens_per_step is None:
            return candidates
        most = STEP_TOLERANCE * tokens_per_step / self._world_size
        within = [group for group in candidates if group.pack_len / group.cp_degree <= most]
        return within if any(group.pack_len >= self._sorted[-1] for group in within) else candidates

    def estimate_s(self, groups: Sequence[PackingGroup]) -> float:
        """Estimate an epoch's seconds in closed form: every sample in the shortest group that holds it, perfect balance."""
        starts = (0, *(group.pack_len for group in groups[:-1]))
        return sum(self._range_s(group, start) for group, start in zip(groups, starts, strict=True))

    def s_per_token(self, group: PackingGroup) -> float:
        """Estimate a rank's seconds for each token that it trains, of all samples that the group holds."""
        tokens = int(self._tokens[np.searchsorted(self._sorted, group.pack_len, side="right")])
        return self._range_s(group, 0) * self._world_size / tokens if tokens else float("inf")

    def epoch_s(self, groups: Sequence[PackingGroup]) -> float:
        """Plan an epoch of all samples, and give its modelled seconds."""
        return self._plan_s(groups, self._lengths)

    def _plan_s(self, groups: Sequence[PackingGroup], lengths: NDArray[np.int32]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is worth saying is said about the plan that is trained
            ones = np.ones_like(lengths)
            plan = self._planner.plan(lengths, ones, groups, world_size=self._world_size, seed=self._seed, cost=self._cost)
        return float(micro_step_s(plan, self._cost).sum())

    def _promising(self, candidates: Sequence[PackingGroup]) -> list[tuple[PackingGroup, ...]]:
        """List the sets that are worth a plan: the lowest estimates of each number of groups, and of the single groups."""
        sets = sorted(self._sets(candidates), key=self.estimate_s)
        holding: list[tuple[PackingGroup, ...]] = [(group,) for group in candidates if group.pack_len >= self._sorted[-1]]
        by_size = [sorted(holding, key=self.estimate_s)]
        by_size += [[groups for groups in sets if len(groups) == size] for size in range(2, MAX_GROUPS + 1)]
        return [groups for same_size in by_size for groups in same_size[:_PLANNED]]

    def _sets(self, candidates: Sequence[PackingGroup]) -> list[tuple[PackingGroup, ...]]:
        """List sets of lengths, each with the fastest strategy for what it gets; the last holds the longest sample, no other."""
        pack_lens = sorted({group.pack_len for group in candidates})
        shorter = [pack_len for pack_len in pack_lens if pack_len < self._sorted[-1]]
        sets = []
        for size, last in itertools.product(range(MAX_GROUPS), pack_lens[len(shorter) :]):
            for chosen in itertools.combinations(shorter, size):
                ends, starts = (*chosen, last), (0, *chosen)
                sets.append(tuple(self._fastest(candidates, end, start) for start, end in zip(starts, ends, strict=True)))
        return sets

    def _fastest(self, candidates: Sequence[PackingGroup], pack_len: int, start: int) -> PackingGroup:
        strategies = [group for group in candidates if group.pack_len == pack_len]
        return min(strategies, key=lambda group: (self._range_s(group, start), group.cp_degree, group.ac_layers))

    def _range_s(self, group: PackingGroup, start: int) -> float:
        """Estimate the seconds of all samples with more than ``start`` tokens, up to the group's length."""
        first, end = np.searchsorted(self._sorted, (start, group.pack_len), side="right")
        if first == end:
            return 0.0
        longest = self._sorted[end - 1]
        tokens, squares = self._tokens[end] - self._tokens[first], self._squares[end] - self._squares[first]
        all_s, longest_s = self._cost.pack_seconds(
            np.array([tokens, longest]),
            np.array([squares, longest**2]),
            np.full(2, group.cp_degree),
            np.full(2, group.ac_layers),
            group.ac_mode == "selective",
        ).total
        replicas = self._world_size // group.cp_degree
        micro_steps = max(1.0, float(tokens) / (group.pack_len * replicas))
        busy_s = max(float(all_s) / replicas, float(longest_s)) + self._cost.micro_step_s * micro_steps
        return max(busy_s, self._cost.gather_s(self._world_size) * micro_steps)


def _fewest_recomputed(candidates: Sequence[PackingGroup]) -> list[PackingGroup]:
    """Drop candidates that recompute more layers than another of the same length, CP degree and mode."""
    fewest: dict[tuple[int, int, str], PackingGroup] = {}
    for group in sorted(candidates, key=lambda group: group.ac_layers):
        fewest.setdefault((group.pack_len, group.cp_degree, group.ac_mode), group)
    return [group for group in candidates if fewest[group.pack_len, group.cp_degree, group.ac_mode] is group]


def _shortlist(seconds: Mapping[tuple[PackingGroup, ...], float]) -> list[tuple[PackingGroup, ...]]:
    """Keep the fastest sets, the fastest of those with fewer groups, and the fastest single group."""
    planned = sorted(seconds, key=lambda groups: seconds[groups])
    smaller = [groups for groups in planned if len(groups) < len(planned[0])]
    single = next(groups for groups in planned if len(groups) == 1)
    return list(dict.fromkeys([*planned[:_FINALISTS], *smaller[:_FINALISTS], single]))


def paper_rule(s_per_token: Sequence[tuple[PackingGroup, float]], fewest: Fewest) -> tuple[PackingGroup, ...]:
    """Choose groups by the HBP paper's Algorithm 1, of lengths from 8K on where there are any.

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
    for group, seconds in [pair for pair in s_per_token if pair[0].pack_len >= _PAPER_SHORTEST_LEN] or s_per_token:
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
